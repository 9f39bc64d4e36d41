"""Imports go one way, `import coheld` stays light, and the C files keep their order and size."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import coheld
from coheld.testing.support import procs

PACKAGE = Path(coheld.__file__).parent

# Each may import what stands before it, and itself. A new module finds its place here first.
LAYERS = [
    "_version",
    "errors",
    "process",
    "owner",
    "ward",
    "waiting",
    "_native",
    "_portable",
    "native",
    "observing",
    "backends",
    "state",
    "aio",
    "mutex",
    "leases",
    "lockable",
    "roll",
    "semaphore",
    "ledger",
    "pool",
    "lessees",
    "inspecting",
    "sight",
    "history",
    "graph",
    "ordering",
    "otel",
    "stacks",
    "coheld",  # the package as its users see it
    "pyats",
    "cli",
    "__main__",
    "pytest",
    "testing",
]

HEAVY = ["asyncio", "msgspec", "multiprocessing", "opentelemetry", "psycopg", "redis", "rich", "textual"]

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer that a source file belongs to."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "coheld" if first == "__init__" else first


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    """Line and layer of every import of ours, also of those inside functions; not those for type checkers alone."""
    package = ["coheld", *path.relative_to(PACKAGE).parts[:-1]]
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, layer_named(alias.name)) for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names if is_ours(module) else []:
                yield node.lineno, layer_named(f"{module}.{alias.name}")


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "coheld"


def layer_named(module: str) -> str:
    """The layer of "coheld.x.y" is x; what is no module of ours is a name of the package."""
    _, _, rest = module.partition(".")
    first = rest.split(".")[0]
    return first if first in LAYERS else "coheld"


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but not the bodies of `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from executed(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = layer_of(path)
    assert own in LAYERS, f"{own} has no place in LAYERS"
    allowed = LAYERS[: LAYERS.index(own) + 1]
    wrong = [f"line {line}: {layer}" for line, layer in imported_layers(path) if layer not in allowed]
    assert not wrong, f"{own} must not import what stands above it: {wrong}"


def test_the_search_sees_imports_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "backends").mkdir()
    source = tmp_path / "backends" / "shm.py"
    source.write_text(
        "import coheld.cli\nfrom coheld import lockable\nfrom .. import owner\nfrom ..mutex import Mutex\n"
        "from . import files\ndef later():\n    from coheld import Lockable\n"
        "if TYPE_CHECKING:\n    import coheld.state\n"
    )
    assert list(imported_layers(source)) == [
        (1, "cli"),
        (2, "lockable"),
        (3, "owner"),
        (4, "mutex"),
        (5, "backends"),
        (7, "coheld"),
    ]


def test_importing_coheld_imports_nothing_heavy() -> None:
    loaded = procs.run("import sys, coheld; print(*sys.modules)").split()
    assert "coheld.lockable" in loaded
    assert not set(HEAVY) & set(loaded)


def test_a_missing_heavy_module_is_not_missed() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    assert procs.run(f"{blocked}; import coheld; coheld.Lockable().acquire(); print('held')").strip() == "held"


C_FILES = sorted((Path(__file__).parents[1] / "src" / "coheld").glob("*.[ch]"))
BANNER = re.compile(r"^/\* ==== (\d+)\. .+ ==== \*/$", re.MULTILINE)


@pytest.mark.source_tree
def test_the_c_sources_are_found() -> None:
    assert "_native.c" in [path.name for path in C_FILES]


@pytest.mark.source_tree
@pytest.mark.parametrize("path", C_FILES, ids=lambda path: path.name)
def test_c_sections_stand_in_order(path: Path) -> None:
    numbers = [int(number) for number in BANNER.findall(path.read_text())]
    assert len(numbers) >= 2
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.source_tree
@pytest.mark.parametrize("path", C_FILES, ids=lambda path: path.name)
def test_a_c_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 900
