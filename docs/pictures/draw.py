"""Draw the pictures of the pages: `PYTHONPATH=tests python docs/pictures/draw.py` writes them beside itself.

Those of the commands show what tests/scene.py says of some processes, and none of them has to run.

Each has a panel and two sets of colours of its own, so it can be read on a page of any theme, also where the switch of
a site and that of the system differ.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

from coheld import Resource
from coheld.graph import graph_of

WIDTH = 720

STYLE = """
text { font: 14px system-ui, "DejaVu Sans", sans-serif; fill: #24292f }
.small { font-size: 12px; fill: #57606a }
.code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }
.strong { font-weight: 600 }
.panel { fill: #fafaf8; stroke: #d5d5d0 }
.plain { fill: #ffffff; stroke: #8c959f }
.held { fill: #cbe7d3; stroke: #2e7d4f }
.wait { fill: #f5e6bd; stroke: #9a6b00 }
.dead { fill: #f7d0cd; stroke: #b3261e }
.note { fill: #d6e4f7; stroke: #2f5f9e }
.line { fill: none; stroke: #57606a; stroke-width: 1.5 }
.thin { fill: none; stroke: #8c959f; stroke-dasharray: 4 3 }
.tip { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ec }
  .small { fill: #aab2bb }
  .panel { fill: #1c2128; stroke: #444c56 }
  .plain { fill: #2a313a; stroke: #768390 }
  .held { fill: #1f4a30; stroke: #57b97c }
  .wait { fill: #4d3b0c; stroke: #d3a03a }
  .dead { fill: #5a2320; stroke: #f0857c }
  .note { fill: #1f3a5c; stroke: #74a5e4 }
  .line { stroke: #aab2bb }
  .thin { stroke: #768390 }
  .tip { fill: #aab2bb }
}
"""


class Picture:
    """Shapes on a panel; all places are in pixels, from the top left."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title = height, title
        self.shapes: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str, text: str = "") -> None:
        """A box with lines of text in its middle."""
        shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>'
        self.shapes.append(shape)
        first = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, first + 18 * number, line, text, "middle")

    def line(self, *points: tuple[float, float], kind: str = "line", arrow: bool = False) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' if arrow else ""
        self.shapes.append(f'<path d="{path}" class="{kind}"{end}/>')

    def arrow(self, *points: tuple[float, float], kind: str = "line") -> None:
        self.line(*points, kind=kind, arrow=True)

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        tip = '<path d="M0 0 L8 4 L0 8 z" class="tip"/>'
        marker = f'<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{tip}</marker>'
        panel = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" class="panel"/>'
        body = "\n".join([panel, *self.shapes])
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(self.title)}</title>'
        return f"{head}\n<style>{STYLE}</style>\n<defs>{marker}</defs>\n{body}\n</svg>\n"


def mutex() -> Picture:
    """What a call does to get the lock, and what the mutex's word says meanwhile."""
    p = Picture(404, "How a call gets the lock, and what the mutex's word says")
    p.box(24, 24, 150, 40, "plain", "mine already?")
    p.arrow((174, 44), (508, 44))
    p.text(186, 38, "yes", "small")
    p.box(510, 24, 186, 40, "held", "one level more")
    p.arrow((99, 64), (99, 98))
    p.text(107, 86, "no", "small")
    p.box(24, 100, 150, 40, "plain", "try, at once")
    p.arrow((174, 120), (508, 120))
    p.text(186, 114, "got it: the usual case, no system call", "small")
    p.box(510, 100, 186, 40, "held", "the method runs")
    p.arrow((99, 140), (99, 174))
    p.text(107, 162, "taken", "small")
    p.box(24, 176, 300, 58, "plain", "count me as a waiter;", "let go of the interpreter")
    p.arrow((99, 234), (99, 266))
    p.box(24, 268, 300, 40, "wait", "sleep on the word, 1 s at most")
    p.arrow((324, 288), (428, 288))
    p.text(334, 281, "woken", "small")
    p.box(430, 259, 266, 58, "plain", "take the interpreter back,", "run handlers of signals")
    p.arrow((603, 259), (603, 227))
    p.box(510, 186, 186, 40, "plain", "try")
    p.arrow((603, 186), (603, 142))
    p.text(611, 168, "got it", "small")
    p.arrow((510, 206), (326, 206))
    p.text(418, 199, "taken", "small", "middle")
    p.text(418, 222, "(past the deadline: give up)", "small", "middle")
    p.text(24, 346, "the word:", "strong")
    words = [("0", "free", "plain"), ("thread number", "held", "held"), ("number + waiters", "held, wake one", "wait")]
    words.append(("owner died", "next try: lock and news", "dead"))
    for column, (word, meaning, kind) in enumerate(words):
        p.box(112 + 148 * column, 330, 140, 26, kind, word, text="code")
        p.text(182 + 148 * column, 376, meaning, "small", "middle")
    return p


def lane(p: Picture, y: float, name: str, *spans: tuple[float, float, str, str], height: float = 30) -> None:
    """A process's time, from left to right: spans of (from, to, kind, words)."""
    p.text(20, y + height / 2 + 5, name)
    p.line((110, y + height / 2), (700, y + height / 2), kind="thin")
    for start, end, kind, words in spans:
        p.box(start, y, end - start, height, kind, words, text="small")


def handoff() -> Picture:
    """Two processes that ask again at once, without and with hand-off."""
    p = Picture(330, "Two processes that ask again at once: without hand-off one starves, with it they take turns")
    p.text(20, 30, "Whoever is first gets it: always A, since B has to wake up", "strong")
    turns = [(110 + 117 * turn, 222 + 117 * turn, "held", "holds") for turn in range(5)]
    lane(p, 46, "process A", *turns)
    lane(p, 84, "process B", (170, 690, "wait", "waits, and waits"))
    p.line((20, 136), (700, 136), kind="thin")
    p.text(20, 164, "With hand-off", "strong")
    turns = [(110, 246, "held", "holds"), (252, 420, "wait", "lets B pass")]
    turns += [(426, 560, "held", "holds"), (566, 690, "wait", "lets B pass")]
    lane(p, 204, "process A", *turns)
    turns = [(170, 248, "wait", "waits"), (254, 420, "held", "holds")]
    turns += [(426, 562, "wait", "waits"), (568, 690, "held", "holds")]
    lane(p, 242, "process B", *turns)
    p.line((249, 190), (249, 290), kind="line")
    p.text(249, 184, "B has waited 0.5 ms: this release marks “hand-off”", "small", "middle")
    p.line((423, 200), (423, 290), kind="line")
    p.line((564, 200), (564, 290), kind="line")
    p.text(240, 308, "B takes it, and clears the mark", "small", "middle")
    p.text(494, 308, "the same for A, and so on", "small", "middle")
    return p


def recovery() -> Picture:
    """A holder is killed; the next one gets the lock and the news."""
    p = Picture(394, "A holder is killed; the kernel marks the lock, and the waiter recovers what was half done")
    p.line((262, 34), (262, 262))
    p.text(262, 26, "SIGKILL", "strong", "middle")
    lane(p, 48, "process A", (110, 256, "held", "in the method"))
    p.line((256, 54), (270, 72), kind="line")
    p.line((270, 54), (256, 72), kind="line")
    lane(p, 92, "kernel", (264, 380, "dead", "marks, wakes B"))
    lane(p, 136, "process B", (130, 378, "wait", "asleep on the word"), (384, 466, "plain", "tries"))
    p.box(470, 136, 110, 30, "note", "__recover__", text="code")
    p.box(584, 136, 112, 30, "held", "its method", text="small")
    p.text(20, 206, "the word")
    p.box(110, 187, 152, 28, "held", "A + waiters", text="code")
    p.box(262, 187, 146, 28, "dead", "owner died", text="code")
    p.box(408, 187, 288, 28, "held", "B", text="code")
    p.text(20, 246, "recovering")
    p.box(424, 227, 156, 28, "note", "up", text="code")
    p.line((110, 241), (424, 241), kind="thin")
    p.line((580, 241), (696, 241), kind="thin")
    steps = [(416, "1"), (432, "2"), (452, "3"), (525, "4"), (580, "5")]
    for x, number in steps:
        p.line((x, 168), (x, 262), kind="thin")
        p.text(x, 276, number, "small strong", "middle")
    legend = ("1  the mutex is usable again", "2  flag up, who died is noted", "3  one line is logged")
    for row, words in enumerate(legend):
        p.text(290, 306 + 20 * row, words, "small")
    for row, words in enumerate(("4  __recover__, under the lock", "5  flag down")):
        p.text(498, 306 + 20 * row, words, "small")
    p.text(110, 376, "If B is killed before 5, its own death is marked as well, and the next begins again.", "small")
    return p


def segments() -> Picture:
    """Which process maps which file, and who removes it."""
    p = Picture(430, "Files of locks in shared memory, and the processes that map and remove them")
    p.text(20, 32, "processes", "strong")
    p.text(318, 32, "/dev/shm/coheld-1000/", "strong code")
    p.box(20, 52, 160, 52, "plain", "P, made locks", "and forked C")
    p.box(20, 130, 160, 52, "plain", "C, its child")
    p.box(20, 208, 160, 52, "plain", "U, unrelated")
    p.box(20, 334, 160, 52, "dead", "D, killed")
    p.box(318, 52, 382, 84, "plain")
    p.text(330, 72, "arena-<P>-<start>-<random>", "code")
    p.box(330, 88, 92, 34, "note", "header", text="small")
    for number in range(4):
        p.box(430 + 52 * number, 88, 46, 34, "held", "lock", text="small")
    p.text(646, 110, "…", "", "middle")
    p.box(318, 182, 382, 84, "plain")
    p.text(330, 202, "name-lab%2Fbed-1", "code")
    p.box(330, 218, 92, 34, "note", "header", text="small")
    p.box(430, 218, 46, 34, "held", "lock", text="small")
    p.text(486, 240, "stays until coheld rm, or a restart", "small")
    p.box(318, 302, 382, 84, "dead")
    p.text(330, 322, "arena-<D>-<start>-<random>", "code")
    p.box(330, 338, 92, 34, "note", "header", text="small")
    p.box(430, 338, 46, 34, "held", "lock", text="small")
    p.text(486, 360, "nobody's flock on it, so it goes", "small")
    p.arrow((180, 78), (316, 78))
    p.text(248, 71, "maps, flock", "small", "middle")
    p.arrow((180, 148), (250, 148), (250, 104), (316, 104))
    p.text(240, 170, "the same flock", "small", "middle")
    p.arrow((180, 226), (316, 226))
    p.text(248, 219, "maps", "small", "middle")
    p.arrow((180, 248), (218, 248), (218, 356), (316, 356))
    p.text(224, 290, "makes a lock,", "small")
    p.text(224, 305, "and sweeps", "small")
    p.text(
        20, 412, "The kernel dropped D's flock when D ended. Whoever gets an exclusive one removes the file.", "small"
    )
    return p


@dataclass
class Drawn:
    """By the command itself."""

    content: str

    def svg(self) -> str:
        return self.content


def graph() -> Drawn:
    """coheld graph --svg."""
    from coheld.cli.picture import svg
    from scene import lab

    return Drawn(svg(graph_of(lab(1000.0)), 1000.0))


def top() -> Drawn:
    """coheld top, after a minute in which ever more had to wait, and then less."""
    return Drawn(asyncio.run(_screen()))


async def _screen() -> str:
    from coheld.cli.screen import Looked, Top
    from coheld.sight import see
    from scene import lab

    done, now = threading.Event(), time.monotonic()
    screen = Top(
        lambda: lab() if done.wait() else [], every=0
    )  # the looks are given below: their times are in the rates
    looks = [[replace(see(one), when=now - ago) for one in _uses(lab(now), ago)] for ago in range(60, -1, -1)]
    async with screen.run_test(size=(112, 26)) as pilot:
        for look in looks:
            screen.post_message(Looked(look))
        while len(screen.history.contended(looks[0][0].resource.place)) < 60:
            await pilot.pause(0.01)
        await pilot.pause()
        picture = screen.export_screenshot(title="coheld top")
        done.set()
    return picture


def _uses(resources: list[Resource], ago: int) -> Iterator[Resource]:
    """As they were so many seconds ago."""
    for taken, share, one in zip((9, 7, 5, 2, 1), (1, 4, 9, 60, 60), resources, strict=True):
        waits = sum((n * n) % 7 + (n // 6 if n < 40 else 9 - (n - 40) // 3) for n in range(60 - ago, 60)) // share
        yield replace(one, acquisitions=one.acquisitions - taken * ago, contended=max(0, one.contended - waits))


PICTURES = (mutex, handoff, recovery, segments, graph, top)

if __name__ == "__main__":
    for picture in PICTURES:
        Path(__file__).with_name(f"{picture.__name__}.svg").write_text(picture().svg())
