"""The graph as an SVG: parties on the left, resources on the right, and a line for each that has or waits."""

from collections.abc import Callable, Sequence
from html import escape

from coheld.cli.graph import NOBODY
from coheld.graph import Edge, Graph, Party
from coheld.process import printable

_LEFT, _WORDS, _BEND, _RIGHT = (24, 330), 362, 590, (720, 250)
"""From left to right, pixels: boxes of parties (x, width); what is written on lines; where these bend; resources."""
_WIDTH, _GAP, _STEP, _TOP = 994, 20, 22, 24
_LETTERS = 44
"""As many fit into a box of a party; into the others less."""

_STYLE = """
text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #24292f }
.small { font-size: 12px; fill: #57606a }
.panel { fill: #fafaf8; stroke: #d5d5d0 }
.party { fill: #ffffff; stroke: #8c959f }
.resource { fill: #d6e4f7; stroke: #2f5f9e }
.holds { fill: none; stroke: #2e7d4f; stroke-width: 1.5 }
.waits { fill: none; stroke: #9a6b00; stroke-width: 1.5; stroke-dasharray: 5 4 }
.party.cycle, .resource.cycle { fill: #f7d0cd; stroke: #b3261e }
.holds.cycle, .waits.cycle { stroke: #b3261e; stroke-width: 2.5 }
.small.cycle { fill: #b3261e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ec }
  .small { fill: #aab2bb }
  .panel { fill: #1c2128; stroke: #444c56 }
  .party { fill: #2a313a; stroke: #768390 }
  .resource { fill: #1f3a5c; stroke: #74a5e4 }
  .holds { stroke: #57b97c }
  .waits { stroke: #d3a03a }
  .party.cycle, .resource.cycle { fill: #5a2320; stroke: #f0857c }
  .holds.cycle, .waits.cycle { stroke: #f0857c }
  .small.cycle { fill: #f0857c }
}
"""


class _Box:
    """A node, with a place on its side for each of its lines."""

    def __init__(self, kind: str, words: Sequence[str], edges: list[Edge]) -> None:
        self.kind, self.words, self.edges = kind, [_cut(line) for line in words if line], edges
        self.height = max(18 * len(self.words) + 14, _STEP * len(edges) + 8)
        self.y = 0.0
        self.places: dict[int, int] = {}

    def sort(self, key: Callable[[Edge], int]) -> None:
        """Its lines in that order."""
        self.edges.sort(key=key)
        self.places = {id(edge): place for place, edge in enumerate(self.edges)}

    def port(self, edge: Edge) -> float:
        """Where its line begins or ends."""
        return self.y + self.height / 2 + _STEP * (self.places[id(edge)] - (len(self.edges) - 1) / 2)

    def shapes(self, x: float, width: float) -> list[str]:
        kind = f"{self.kind}{' cycle' * any(edge.in_cycle for edge in self.edges)}"
        first = self.y + self.height / 2 + 5 - 9 * (len(self.words) - 1)
        box = f'<rect x="{x:g}" y="{self.y:g}" width="{width:g}" height="{self.height:g}" rx="5" class="{kind}"/>'
        return [box, *(_text(x + 10, first + 18 * n, line, "small" * bool(n)) for n, line in enumerate(self.words))]


def svg(graph: Graph, now: float) -> str:
    """The whole file."""
    places = {one.place: number for number, one in enumerate(graph.resources)}
    at_places = graph.at_places()
    right = [_Box("resource", [_cut(one.label, 30)], at_places[one.place]) for one in graph.resources]
    of_parties: dict[Party, list[Edge]] = {}
    for edge in graph.edges:
        of_parties.setdefault(edge.party, []).append(edge)
    parties = sorted(of_parties, key=lambda party: _middle([places[edge.place] for edge in of_parties[party]]))
    left = [_Box("party", [party.name, party.command], of_parties[party]) for party in parties]
    rows = {party: row for row, party in enumerate(parties)}
    for box in right:  # lines to the same box in the order in which they come
        box.sort(lambda edge: rows[edge.party])
    for box in left:
        box.sort(lambda edge: places[edge.place])
    height = _TOP + max(60, _stacked(left), _stacked(right))
    shapes = _lines(graph, dict(zip(parties, left, strict=True)), dict(zip(places, right, strict=True)), now)
    shapes += [
        shape for boxes, side in ((left, _LEFT), (right, _RIGHT)) for box in boxes for shape in box.shapes(*side)
    ]
    if not graph.resources:
        shapes.append(_text(_LEFT[0], _TOP + 20, NOBODY))
    return _file(height, shapes)


def _stacked(column: list[_Box]) -> float:
    """Each below the one before; where the last ends."""
    y = float(_TOP)
    for box in column:
        box.y = y
        y += box.height + _GAP
    return y - _GAP


def _middle(rows: list[int]) -> float:
    """Beside its resources, so that few lines cross."""
    return sum(rows) / len(rows)


def _lines(graph: Graph, left: dict[Party, _Box], right: dict[str, _Box], now: float) -> list[str]:
    shapes = []
    for edge in graph.edges:
        start, end = left[edge.party].port(edge), right[edge.place].port(edge)
        kind = f"{'holds' if edge.holds else 'waits'}{' cycle' * edge.in_cycle}"
        tip = f'marker-{"start" if edge.holds else "end"}="url(#{"red" if edge.in_cycle else kind})"'
        x, to = sum(_LEFT), _RIGHT[0]
        middle = (_BEND + to) / 2
        path = f"M{x} {start:g} H{_BEND} C{middle:g} {start:g} {middle:g} {end:g} {to} {end:g}"
        shapes.append(f'<path d="{path}" class="{kind}" {tip}/>')
        shapes.append(_text(_WORDS, start - 5, _cut(edge.told(now), 36), f"small{' cycle' * edge.in_cycle}"))
    return shapes


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def _cut(words: str, letters: int = _LETTERS) -> str:
    words = printable(words)
    return words if len(words) <= letters else f"{words[: letters - 1]}…"


def _file(height: float, shapes: list[str]) -> str:
    size = f'viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" height="{height:g}"'
    colors = {"holds": "#2e7d4f", "waits": "#9a6b00", "red": "#b3261e"}
    tips = "".join(
        f'<marker id="{name}" markerUnits="userSpaceOnUse" markerWidth="10" markerHeight="10" refX="9" refY="5" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{color}"/></marker>'
        for name, color in colors.items()
    )
    panel = f'<rect x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1:g}" rx="8" class="panel"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>Who has what, and who waits</title>'
    body = "\n".join([panel, *shapes])
    return f"{head}\n<style>{_STYLE}</style>\n<defs>{tips}</defs>\n{body}\n</svg>\n"
