"""`python -m coheld`: the command, where its script is not on the path."""

import sys

from coheld.cli import main

sys.exit(main())
