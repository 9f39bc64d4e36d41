"""Machines without Cisco's pyATS: what adopt() says there, and the distribution in compat/.

The programs here see no pyATS, also where it is installed: it is hidden from them, or their environment is a new one.
"""

from pathlib import Path

import pytest

from coheld.testing.contract import test_reference
from coheld.testing.support import procs
from tools.environments import COMPAT, Environment, build

EXAMPLE = test_reference.EXAMPLE.replace("from coheld import", "from pyats.async_.synchronize import")

# A module of that name, whatever else is installed.
PRETENDED = """
import sys, types
for name in ("pyats", "pyats.async_", "pyats.async_.synchronize"):
    sys.modules[name] = types.ModuleType(name)
module = sys.modules["pyats.async_.synchronize"]
"""


def refused(source: str) -> str:
    """What adopt() raises after that source: the type's name, and the message."""
    attempt = "try:\n    coheld.pyats.adopt()\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    return procs.run(f"{source}\nimport coheld.pyats\n{attempt}")


# ---- adopt() -----------------------------------------------------------------------------------------------


def test_adopt_says_that_pyats_is_missing() -> None:
    said = refused("import sys; sys.modules['pyats'] = None")
    assert said.startswith("ImportError there is no pyATS to adopt (") and "pip install pyats packaging" in said


def test_adopt_says_which_part_of_pyats_is_missing() -> None:
    said = refused(f"{PRETENDED}\nsys.modules['pyats.async_.synchronize'] = None")
    assert "pyats.async_.synchronize" in said and said.startswith("ImportError")


def test_importing_the_module_needs_no_pyats() -> None:
    assert procs.run("import sys; sys.modules['pyats'] = None; import coheld.pyats; print('there')") == "there\n"


@pytest.mark.parametrize(
    ("init", "acquire", "complaint"),
    [
        (
            "def __init__(self): pass",
            "def acquire(self, block=True, timeout=None): pass",
            "__init__ of this pyATS takes no lock",
        ),
        (
            "def __init__(self, *, lock=int): pass",
            "def acquire(self, timeout=None): pass",
            "acquire of this pyATS takes no block",
        ),
    ],
)
def test_an_unknown_class_is_refused_whole(init: str, acquire: str, complaint: str) -> None:
    source = f"{PRETENDED}\nclass Lockable:\n    {init}\n    {acquire}\nmodule.Lockable = Lockable"
    source += "\nbefore = dict(vars(Lockable))"
    said = refused(source)
    assert said.startswith("IncompatibleError") and complaint in said
    unchanged = (
        "try:\n    coheld.pyats.adopt()\nexcept coheld.IncompatibleError:\n    print(before == dict(vars(Lockable)))"
    )
    assert procs.run(f"{source}\nimport coheld.pyats\n{unchanged}") == "True\n"


# ---- compat/ -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """One with the distribution, built here, and without Cisco's pyATS."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    made.install_wheel(build(COMPAT, tmp_path_factory.mktemp("wheel")))
    return made


@pytest.mark.source_tree
def test_the_references_example_runs_unchanged(environment: Environment) -> None:
    assert environment.python(EXAMPLE + test_reference.USE) == "one and two 0\n"


@pytest.mark.source_tree
def test_its_class_is_ours_and_adopting_it_does_nothing(environment: Environment) -> None:
    source = (
        "import coheld.pyats; coheld.pyats.adopt(); from pyats.async_.synchronize import Lockable; "
        "print(Lockable is coheld.Lockable, 'acquire' in vars(Lockable))"
    )
    assert environment.python(source) == "True False\n"


@pytest.mark.source_tree
def test_it_offers_nothing_else_of_pyats(environment: Environment) -> None:
    source = "try:\n    import pyats.topology\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert environment.python(source) == "No module named 'pyats.topology'\n"


@pytest.mark.source_tree
def test_a_start_of_python_imports_nothing_for_it(environment: Environment) -> None:
    loaded = "import sys; print(*[name for name in sys.modules if 'coheld' in name or 'pyats' in name])"
    assert environment.python(loaded) == "coheld_pyats_compat\n"


@pytest.mark.source_tree
@pytest.mark.parametrize("parts", [0, 1, 2, 3])
def test_every_part_that_another_has_is_the_others(environment: Environment, tmp_path: Path, parts: int) -> None:
    """The other's pyats/, with or without __init__.py: parts of them; what is missing is made up for."""
    package = tmp_path / "pyats" / "async_"
    package.mkdir(parents=True)
    others = (
        [package.parent / "__init__.py", package / "__init__.py", package / "synchronize.py"][-parts:] if parts else []
    )
    for file in others:
        file.write_text("Lockable = 'theirs'\n")
    source = "import sys; sys.path.append(sys.argv[1]); from pyats.async_.synchronize import Lockable; print(Lockable)"
    said = environment.python(source, str(tmp_path))
    assert said == ("theirs\n" if parts else "<class 'coheld.Lockable'>\n")


@pytest.mark.source_tree
def test_a_finder_that_comes_later_is_asked_before_it(environment: Environment) -> None:
    source = """
import importlib.util, sys
class Later:
    def find_spec(self, name, path=None, target=None):
        print("asked for", name)
        return importlib.util.spec_from_loader(name, self, is_package=True) if name == "pyats" else None
    def create_module(self, spec): return None
    def exec_module(self, module): module.theirs = True
sys.meta_path.append(Later())
import pyats
print(pyats.theirs)
"""
    assert environment.python(source) == "asked for pyats\nTrue\n"
