"""The distribution in compat/ beside Cisco's, installed and removed in either order."""

from pathlib import Path

import pytest

from tools.environments import COMPAT, Environment, build

# Where the class comes from, and whether each installed file is the one that its distribution brought.
LOOK = """
import base64, hashlib
from importlib import metadata
from pyats.async_.synchronize import Lockable

for one in metadata.distributions():
    for file in one.files or []:
        if one.name.startswith(("pyats", "coheld")) and file.hash:
            found = hashlib.new(file.hash.mode, file.read_binary()).digest()
            assert base64.urlsafe_b64encode(found).decode().rstrip("=") == file.hash.value, file
print(Lockable.__module__)
"""

USE = """
from pyats.async_ import pcall
from pyats.async_.synchronize import Lockable
class Counter(Lockable):
    @Lockable.locked
    def twice(self, number): return 2 * number
print(*pcall(Counter().twice, number=[1, 2, 3]))
"""

ADOPT = """
import coheld.backends.base, coheld.pyats
from pyats.async_.synchronize import Lockable
coheld.pyats.adopt()
print(isinstance(Lockable().__lock__, coheld.backends.base.Handle))
"""


def install(environment: Environment, what: str, directory: Path) -> None:
    if what == "Cisco's":
        environment.pip("install", "pyats", "packaging")
    else:
        environment.install_wheel(build(COMPAT, directory))


def check_that_ciscos_works(environment: Environment) -> None:
    assert environment.python(LOOK) == "pyats.async_.synchronize\n"
    assert environment.python(USE) == "2 4 6\n"
    assert environment.python(ADOPT) == "True\n"


@pytest.mark.hang_limit(600)
@pytest.mark.parametrize("order", [["Cisco's", "ours"], ["ours", "Cisco's"]], ids=["ours last", "ours first"])
def test_ciscos_is_whole_and_is_the_one_that_is_imported(tmp_path: Path, order: list[str]) -> None:
    environment = Environment(tmp_path / "environment")
    for what in order:
        install(environment, what, tmp_path)
    check_that_ciscos_works(environment)
    if order[-1] == "ours":
        environment.pip("uninstall", "-y", "coheld-pyats-compat")
        check_that_ciscos_works(environment)
    else:
        environment.pip("uninstall", "-y", "pyats.async")  # the part of it that has the module; the others stay
        assert environment.python(LOOK) == "coheld\n"
