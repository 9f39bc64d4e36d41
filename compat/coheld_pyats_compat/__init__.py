"""Find ``pyats.async_.synchronize`` here, if nothing else on this machine has it.

The file of that name cannot simply be installed where Cisco's is: pip overwrites without a word what another
distribution has put there, and an uninstall of either takes the other's away.  So it lies below this package, where no
path leads, and a finder at the end of sys.meta_path, put there by the .pth file beside this package, shows the way when
all others have been asked in vain.  A directory in the .pth file would do with less, but then a place in sys.path
decides: it comes before the site-packages that a virtual environment inherits, and before finders (those of editable
installs) that follow the one for sys.path.

Each level is asked for by itself, so any part of pyATS that is installed is Cisco's.  There is no __init__.py below
pyats/: as namespace packages they give way to any other part that appears on sys.path.

This runs at the start of every Python of the environment: it imports nothing, and coheld only when it is asked for.
"""

import sys

_NAMES = ("pyats", "pyats.async_", "pyats.async_.synchronize")


class _LastResort:
    """A finder that asks all others first, also those that were appended after it."""

    def find_spec(self, name, path=None, target=None):
        if name not in _NAMES:
            return None
        from importlib.machinery import PathFinder

        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if spec := finder.find_spec(name, path, target):
                return spec
        here = [*__path__[:1], *name.split(".")[:-1]]
        return PathFinder.find_spec(name, ["/".join(here)], target)


sys.meta_path.append(_LastResort())
