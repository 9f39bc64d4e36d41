"""How fast coheld is, as ratios to its peers measured in the same run: ``python -m bench``."""
