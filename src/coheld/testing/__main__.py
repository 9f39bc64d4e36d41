"""python -m coheld.testing: pytest, over the tests of this package, and nothing written into its directory."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

DIRECTORY = Path(__file__).parent
PARTS = ("contract", "state", "callers", "conformance")
NEEDED = ("attrs", "cloudpickle", "dill", "hypothesis", "pytest", "sphinx")
USAGE_ERROR = 4  # pytest's, which may be missing


class Selection:
    """Arguments that are no options name a part of the package; without one, it is all of it."""

    def pytest_configure(self, config: "pytest.Config") -> None:
        named = config.args if config.args_source is config.ArgsSource.ARGS else PARTS
        config.args = [str(DIRECTORY / one) for one in named]


def what_is_missing() -> str | None:
    """Why the tests cannot run here."""
    if sys.platform != "linux":
        return f"the tests need Linux, and this is {sys.platform}"
    missing = [name for name in NEEDED if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}; pip install 'coheld[contract]'" if missing else None


def main(arguments: list[str]) -> int:
    """Run them; pytest's exit status."""
    if why := what_is_missing():
        print(f"python -m coheld.testing: {why}", file=sys.stderr)
        return USAGE_ERROR
    import pytest

    sys.dont_write_bytecode = True
    settings = ["-c", str(DIRECTORY / "pytest.ini"), "-p", "no:cacheprovider"]
    return int(pytest.main([*settings, *arguments], [Selection()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
