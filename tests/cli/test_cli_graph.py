"""coheld graph: lines, Mermaid and SVG; and nothing changed by looking."""

import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import coheld
from cli import commands
from coheld import Lockable
from coheld.cli import exits, graph, picture
from coheld.graph import graph_of
from coheld.testing.support import delays, procs, states
from scene import Scene, lab, resource

NOW = 1000.0
BACKENDS = ["shm:", "file:"]
BAD = 'x"]; click p0 "y"\n</text><script>#&|`%%\x1b[31m\u202e'


def take_both(link: procs.Link, first: str, second: str, backend: str) -> None:
    with Lockable(lock_name=first, lock_backend=backend):
        link.say("has")
        link.wait_for("go on")
        Lockable(lock_name=second, lock_backend=backend).acquire(timeout=delays.HANG)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_who_wait_for_each_other_are_a_cycle(backend: str, tmp_path: Path) -> None:
    with (
        procs.start(take_both, "a", "b", backend) as one,
        procs.start(take_both, "b", "a", backend) as other,
    ):
        for worker in (one, other):
            worker.expect("has")
        assert "cycle" not in commands.coheld("graph").stdout
        for worker in (one, other):
            worker.tell("go on")
        states.wait_until(lambda: len(graph_of(coheld.resources()).cycles) == 1, "both wait")
        printed = commands.coheld("graph").stdout
        assert printed.startswith("a cycle of 2: each waits for what the next one holds\n")
        for pid, has, wants in ((one.pid, "a", "b"), (other.pid, "b", "a")):
            who = rf"process {pid} \(.+\), thread MainThread"
            assert re.search(rf"^  {who} waits for '{wants}', and gives up by itself\n", printed, re.MULTILINE)
            assert re.search(rf"^'{has}'\n  {who} holds, .* s \[cycle\]\n", printed, re.MULTILINE)
        assert "linkStyle 0,1,2,3 " in commands.coheld("graph", "--mermaid").stdout
        done = commands.coheld("graph", "--svg", str(tmp_path / "g.svg"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (tmp_path / "g.svg").read_text().count('class="waits cycle"') == 2
        assert [path.name for path in tmp_path.iterdir()] == ["g.svg"]
        for worker in (one, other):
            worker.kill()


def test_on_a_terminal_it_is_a_tree() -> None:
    with Lockable(lock_name="r1"), commands.Terminal([*commands.COHELD, "graph"]) as terminal:
        terminal.expect("'r1'")
        terminal.expect("└── ")
        terminal.expect("holds")
        assert terminal.news() == "ended 0"


def test_who_is_counted_and_not_named_is_counted() -> None:
    one = resource("r1", Scene(NOW).holder(1))
    object.__setattr__(one, "waiters", 3)
    assert graph.text(graph_of([one]), NOW)[-1] == "  3 more, who are not named, wait"


def test_nobody(tmp_path: Path, coheld_dir: Path) -> None:
    assert commands.coheld("graph").stdout == "nobody holds or waits\n"
    assert commands.coheld("graph", "--mermaid").stdout == 'flowchart LR\n  nobody["nobody holds or waits"]\n'
    assert commands.coheld("graph", "--svg", str(tmp_path / "g.svg")).returncode == 0
    assert "nobody holds or waits" in (tmp_path / "g.svg").read_text()
    assert list(coheld_dir.iterdir()) == []


NODE = r'p\d+\["(?P<p>[^"]+)"\]|r\d+\(\["(?P<r>[^"]+)"\]\)'
LINK = r'r\d+ -->\|"[^"|]+"\| p\d+|p\d+ -\.->\|"[^"|]+"\| r\d+'
STYLE = r"classDef cycle \S+|class [pr\d,]+ cycle|linkStyle [\d,]+ \S+"


def test_mermaid_is_what_its_grammar_has_whatever_the_names() -> None:
    at = Scene(NOW)
    bad = resource(BAD, at.holder(1, BAD), at.waiter(2, BAD))
    for graphed in (graph_of([*lab(NOW), bad]), graph_of([])):
        first, *lines = graph.mermaid(graphed, NOW).splitlines()
        assert first == "flowchart LR"
        for line in lines:
            assert re.fullmatch(rf'  (?:{NODE}|{LINK}|{STYLE}|nobody\["[^"]+"\])', line), line
    assert "#34;#93;#59; click" in graph.mermaid(graph_of([bad]), NOW)


def test_the_svg_is_sound_and_its_lines_end_at_boxes() -> None:
    at = Scene(NOW)
    root = ET.fromstring(picture.svg(graph_of([*lab(NOW), resource(BAD, at.holder(1, BAD), at.waiter(2, BAD))]), NOW))
    space = "{http://www.w3.org/2000/svg}"
    boxes = [one for one in root.iter(f"{space}rect") if one.get("class") != "panel"]
    edges = [one for one in root.iter(f"{space}path") if one.get("class")]
    assert len(boxes) == (6 + 2) + (4 + 1) and len(edges) == 3 + 2 + 1 + 3 + 2
    for one in edges:
        x, y, to, end = re.fullmatch(r"M(\S+) (\S+) H\S+ C\S+ \S+ \S+ \S+ (\S+) (\S+)", one.get("d") or "").groups()  # type: ignore[union-attr]
        assert inside(float(y), float(x), boxes) and inside(float(end), float(to), boxes)
    assert len([one for one in edges if "cycle" in (one.get("class") or "")]) == 4
    assert not [one for one in root.iter() if "script" in one.tag]


def inside(y: float, x: float, boxes: list[ET.Element]) -> bool:
    return any(
        float(box.get("y", 0)) <= y <= float(box.get("y", 0)) + float(box.get("height", 0))
        and x in (float(box.get("x", 0)), float(box.get("x", 0)) + float(box.get("width", 0)))
        for box in boxes
    )


def test_a_terminal_is_told_nothing() -> None:
    at = Scene(NOW)
    bad = resource(BAD, at.holder(1, BAD), at.waiter(2, BAD))
    for line in graph.text(graph_of([bad]), NOW):
        assert line.isprintable()


@pytest.mark.parametrize("where", ["missing/g.svg", "", "pipe"])
def test_where_no_file_can_be_nothing_is_left(where: str, tmp_path: Path) -> None:

    os.mkfifo(tmp_path / "pipe")
    done = commands.coheld("graph", "--svg", str(tmp_path / where))
    assert done.returncode == exits.FAILED
    assert done.stderr.startswith(f"coheld: {tmp_path / where} ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_an_old_picture_is_replaced_and_a_link_to_it_kept(tmp_path: Path) -> None:
    (tmp_path / "old.svg").write_text("old")
    (tmp_path / "link").symlink_to("old.svg")
    assert commands.coheld("graph", "--svg", str(tmp_path / "link")).returncode == 0
    assert (tmp_path / "link").is_symlink() and "nobody" in (tmp_path / "old.svg").read_text()
