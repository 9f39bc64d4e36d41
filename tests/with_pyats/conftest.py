"""Every test here has the real pyATS, marked so; its class is as Cisco made it before and after each test."""

import pytest
from pyats.async_.synchronize import Lockable as CiscosLockable

import coheld.pyats


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "with_pyats" in item.path.parts:
            item.add_marker(pytest.mark.pyats)


@pytest.fixture
def adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    """adopt() has been called; at the end its work is undone."""
    for name in ("__init__", "acquire"):
        monkeypatch.setattr(CiscosLockable, name, vars(CiscosLockable)[name])
    coheld.pyats.adopt()
