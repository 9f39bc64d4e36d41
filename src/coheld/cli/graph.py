"""coheld graph: who has what and who waits for it, as a picture."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from coheld.process import printable

if TYPE_CHECKING:
    from coheld.graph import Edge, Graph

NOBODY = "nobody holds or waits"
_RED = "bold red"


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers."""
    parser = commands.add_parser(
        "graph",
        help="show who has what and who waits for it, and cycles of waits",
        description="Show who has which resource and who waits for it, and mark cycles of waits for locks. Takes no "
        "lock and changes nothing.",
        allow_abbrev=False,
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--mermaid", action="store_true", help="as a flowchart in the language of Mermaid")
    kinds.add_argument("--svg", metavar="FILE", help="as a picture; the file is replaced at once, when it is whole")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print or write it. Waits for nobody. Raises: OSError: if the file cannot be written."""
    from coheld.graph import graph_of
    from coheld.inspecting import resources

    graph, now = graph_of(resources()), time.monotonic()
    if options.svg is not None:
        from coheld.cli.picture import svg

        _write(options.svg, svg(graph, now))
    elif options.mermaid:
        print(mermaid(graph, now))
    elif not (sys.stdout.isatty() and _print_tree(graph, now)):
        print(*text(graph, now), sep="\n")
    return 0


def _write(name: str, content: str) -> None:
    """Who reads it meanwhile gets all of the old one or all of the new one."""
    path = os.path.realpath(name)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{name} is no plain file")
    made = f"{path}.{os.getpid()}.new"
    try:
        with open(made, "x", encoding="utf-8") as file:
            file.write(content)
        os.replace(made, path)
    except OSError as error:
        with suppress(FileNotFoundError):
            os.unlink(made)
        raise OSError(f"{name} cannot be written: {error.strerror}") from error


# ---- on a terminal --------------------------------------------------------------------------------------------------


def text(graph: "Graph", now: float) -> list[str]:
    """Plain lines."""
    return [f"{'  ' * level}{line}" for level, line, _ in _lines(graph, now)]


def _print_tree(graph: "Graph", now: float) -> bool:
    try:
        from rich.console import Console
        from rich.text import Text
        from rich.tree import Tree
    except ImportError:
        return False
    console = Console(highlight=False)
    tree: Tree | None = None
    for level, line, red in [*_lines(graph, now), (0, "", False)]:
        if level and tree is not None:
            tree.add(Text(line, style=_RED if red else ""))
        else:
            if tree is not None:
                console.print(tree)
            tree = Tree(Text(line, style=_RED if red else "bold"))
    return True


def _lines(graph: "Graph", now: float) -> Iterator[tuple[int, str, bool]]:
    """Level, words, and whether they tell of a cycle."""
    labels, at_places = graph.labels(), graph.at_places()
    if not graph.resources:
        yield 0, NOBODY, False
    for cycle in graph.cycles:
        yield 0, f"a cycle of {len(cycle)}: each waits for what the next one holds", True
        for edge in cycle:
            ends = ", and gives up by itself" if edge.timed else ""
            yield 1, printable(f"{edge.party} waits for {labels[edge.place]}{ends}"), True
    for one in graph.resources:
        edges = at_places[one.place]
        yield 0, one.label, any(edge.in_cycle for edge in edges)
        for edge in edges:
            yield 1, printable(f"{edge.party} {edge.told(now)}{' [cycle]' * edge.in_cycle}"), edge.in_cycle
        if more := max(0, one.waiters - len(one.waiting)):
            yield 1, f"{more} more, who are not named, wait", False


# ---- for Mermaid ----------------------------------------------------------------------------------------------------


def mermaid(graph: "Graph", now: float) -> str:
    """A flowchart: an arrow to who holds, and a dotted one to what is waited for."""
    lines = ["flowchart LR"]
    if not graph.resources:
        lines.append(f'  nobody["{NOBODY}"]')
    parties = {party: f"p{number}" for number, party in enumerate(graph.parties())}
    places = {one.place: f"r{number}" for number, one in enumerate(graph.resources)}
    for party, key in parties.items():
        command = party.command
        lines.append(f'  {key}["{_escaped(party.name)}{f"<br/>{_escaped(command)}" if command else ""}"]')
    lines += [f'  {places[one.place]}(["{_escaped(one.label)}"])' for one in graph.resources]
    for edge in graph.edges:
        party_key, place, told = parties[edge.party], places[edge.place], _escaped(edge.told(now))
        lines.append(f'  {place} -->|"{told}"| {party_key}' if edge.holds else f'  {party_key} -.->|"{told}"| {place}')
    return "\n".join([*lines, *_in_red(graph.edges, parties, places)])


def _in_red(edges: "tuple[Edge, ...]", parties: dict[Any, str], places: dict[str, str]) -> list[str]:
    red = [number for number, edge in enumerate(edges) if edge.in_cycle]
    if not red:
        return []
    keys = dict.fromkeys(key for n in red for key in (parties[edges[n].party], places[edges[n].place]))
    return [
        "  classDef cycle fill:#f7d0cd,stroke:#b3261e,color:#24292f",
        f"  class {','.join(keys)} cycle",
        f"  linkStyle {','.join(map(str, red))} stroke:#b3261e,stroke-width:3px",
    ]


_PLAIN = frozenset(" .,:_/()'-")


def _escaped(words: str) -> str:
    """In quotes; all but letters, digits and a few more by its number."""
    return "".join(char if char.isalnum() or char in _PLAIN else f"#{ord(char)};" for char in printable(words))
