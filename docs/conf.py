"""How Sphinx builds these pages: `sphinx-build -W docs docs/_build`."""

from coheld import __version__

project = "coheld"
author = "The coheld authors"
copyright = "The coheld authors"  # noqa: A001
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nitpicky = True
exclude_patterns = ["_build"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
nitpick_ignore = [("py:class", f"coheld.{name}") for name in ("lockable.F", "lockable.T", "state.T", "aio.T", "pool.R")]
nitpick_ignore += [("py:class", f"collections.abc.{name}") for name in ("Callable", "Iterable")]
nitpick_ignore += [("py:class", "Handle")]  # what obj.__lock__ is, to observers
nitpick_ignore += [
    ("py:class", "dict[int"),
    ("py:class", "tuple[~coheld.Waiter"),
]  # of a dataclass's signature, cut at the comma
nitpick_ignore += [("py:class", "MeterProvider")]  # of OpenTelemetry

html_theme = "furo"
html_title = f"coheld {version}"
