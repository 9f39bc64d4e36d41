"""What `import coheld` costs, and what it brings."""

import os
import re
from pathlib import Path

import coheld
from coheld.testing.support import procs

PACKAGE = Path(coheld.__path__[0])
OWN, PYTHONS = 30, 60
"""How many modules it may bring, of its own and of Python's: what its time is made of, which bench/rows/importing.py
measures. Whoever needs one more sees what that one costs."""

NEW_MODULES = """
import sys
before = set(sys.modules)
import coheld
print(*sorted(set(sys.modules) - before))
"""

QUIET = """
import os, threading
before = threading.active_count(), len(os.listdir("/proc/self/fd"))
import coheld
assert before == (threading.active_count(), len(os.listdir("/proc/self/fd")))
"""


def new_modules() -> set[str]:
    return set(procs.run(NEW_MODULES).split())


# ---- the import --------------------------------------------------------------------------------------------


def test_it_imports_nothing_but_python_and_itself() -> None:
    from_elsewhere = "import sys, coheld; print(*sys.stdlib_module_names)"
    allowed = {*procs.run(from_elsewhere).split(), "coheld"}
    assert {name.partition(".")[0] for name in new_modules()} <= allowed


def test_it_does_not_import_the_command() -> None:
    assert not {name for name in new_modules() if name.startswith("coheld.cli")}


def test_it_does_not_import_the_tests() -> None:
    assert not {name for name in new_modules() if name.startswith("coheld.testing")}


def test_it_brings_few_modules() -> None:
    own = {name for name in new_modules() if name.partition(".")[0] == "coheld"}
    assert len(own) <= OWN and len(new_modules() - own) <= PYTHONS, sorted(new_modules())


def test_it_opens_nothing_starts_nothing_and_makes_no_file(coheld_dir: Path) -> None:
    assert procs.run(QUIET) == ""
    assert list(coheld_dir.iterdir()) == []


def test_it_does_not_need_a_place_for_locks() -> None:
    nowhere = {**os.environ, "COHELD_DIR": "/proc/nowhere"}
    assert procs.run("import coheld; print(coheld.__version__)", env=nowhere) == f"{coheld.__version__}\n"
    first_use = "import coheld\ntry: coheld.Lockable()\nexcept OSError as error: print(error)"
    assert "/proc/nowhere" in procs.run(first_use, env=nowhere)


# ---- what it brings ----------------------------------------------------------------------------------------


def test_everything_public_is_listed_and_says_that_it_is_cohelds() -> None:
    for name in coheld.__all__:
        thing = getattr(coheld, name)
        assert isinstance(thing, str) or (thing.__module__ == "coheld" and thing.__doc__), name
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = packages | {path.stem for path in PACKAGE.glob("*.py")}
    public = {name for name in vars(coheld) if not name.startswith("_")} - modules | {
        "Pool"
    }  # that is made when asked for
    assert public == {name for name in coheld.__all__ if not name.startswith("_")}


def test_it_has_types() -> None:
    assert (PACKAGE / "py.typed").exists() and (PACKAGE / "_native.pyi").exists()


def test_the_map_shows_every_module() -> None:
    drawn = set(re.findall(r"^ {4}(\w+)(?:\.py|\.c|/) ", coheld.__doc__ or "", re.MULTILINE))
    modules = {path.stem for path in PACKAGE.glob("*.py") if not path.name.startswith("_")}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert drawn == {"_native", "_portable", *modules, *packages}
