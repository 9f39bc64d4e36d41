"""coheld top: what is on the screen, and what keys do. No test waits for a second to pass: looks are given by hand."""

import asyncio
import queue
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

from textual.pilot import Pilot

from cli import commands
from coheld import Lockable, Resource
from coheld.cli import exits
from coheld.cli.screen import Top
from coheld.testing.support import delays, procs
from scene import lab, resource


class Stage:
    """The screen, and the looks that it gets; a look that has not been given lasts until it is."""

    def __init__(self) -> None:
        self._looks: queue.SimpleQueue[Sequence[Resource] | Exception] = queue.SimpleQueue()
        self.top = Top(self._next, every=0)
        self.pilot: Pilot[int]

    def _next(self) -> Sequence[Resource]:
        look = self._looks.get()
        if isinstance(look, Exception):
            raise look
        return look

    def play(self, scene: "Callable[[Stage], Awaitable[None]]") -> None:
        async def run() -> None:
            async with self.top.run_test(size=(120, 32)) as self.pilot:
                try:
                    await scene(self)
                finally:
                    self.end()

        asyncio.run(run())

    def end(self) -> None:
        self.top._looker.end()
        self._looks.put([])

    async def look(self, *resources: Resource) -> None:
        """Show these."""
        self._looks.put(resources)
        await self.until(
            lambda: [row.sight.resource for row in self.top.history.rows("resource")] == sorted_(resources)
        )
        await self.pilot.pause()

    async def fail(self, error: Exception) -> None:
        self._looks.put(error)
        await self.until(lambda: "cannot look" in self.status())

    async def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + delays.LONG
        while not true():
            assert time.monotonic() < deadline, (self.names(), self.status(), self.detail())
            await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    def names(self) -> list[str]:
        return [str(self.top.table.get_row_at(at)[0]) for at in range(self.top.table.row_count)]

    def detail(self) -> str:
        return str(self.top.who.render())

    def status(self) -> str:
        return str(self.top.status.render())

    def under_the_cursor(self) -> str:
        return self.names()[self.top.table.cursor_row]


def sorted_(resources: Sequence[Resource]) -> list[Resource]:
    return sorted(resources, key=lambda one: one.name or "")


def test_who_has_and_who_waits() -> None:
    async def scene(stage: Stage) -> None:
        await stage.look(*lab())
        assert stage.names()[0] == "lab/r1"
        cells = [str(cell) for cell in stage.top.table.get_row_at(0)]
        assert cells == ["lab/r1", "4711 python -m nightly", "Router.configure", "184 s", "2", "", "", "1"]
        await stage.until(lambda: "thread MainThread in Router.ping, for 131 s" in stage.detail())
        assert stage.status() == "5 resources, 4 in use, 4 wait; by waiters"

    Stage().play(scene)


def test_the_cursor_chooses_and_stays_with_its_resource() -> None:
    async def scene(stage: Stage) -> None:
        await stage.look(*lab())
        await stage.press("down")
        assert stage.detail().startswith("'lab/bed-1'")
        await stage.look(resource("first"), *reversed(lab()))
        assert stage.under_the_cursor() == "lab/bed-1" and stage.detail().startswith("'lab/bed-1'")
        await stage.press("s")
        assert stage.under_the_cursor() == "lab/bed-1" and "by taken/s" in stage.status()
        rest = [one for one in lab() if one.name != "lab/bed-1"]
        await stage.look(*rest)
        assert stage.detail().startswith(repr(stage.under_the_cursor()))
        await stage.look()
        assert stage.detail() == ""
        await stage.look(*lab())
        assert stage.detail().startswith(repr(stage.under_the_cursor()))

    Stage().play(scene)


def test_keys_and_headings_sort() -> None:
    async def scene(stage: Stage) -> None:
        await stage.look(*lab())
        await stage.press("s", "s", "s")
        assert "by deaths" in stage.status() and stage.names()[0] == "lab/r1"
        await stage.press("r")
        assert stage.status().endswith("by deaths, reversed") and stage.names()[-1] == "lab/r1"
        await stage.press("s")
        assert stage.names() == sorted(stage.names()) and stage.status().endswith("by resource")
        await stage.pilot.click("DataTable", offset=(2, 0))
        await stage.until(lambda: stage.status().endswith("by resource, reversed"))
        assert stage.names() == sorted(stage.names(), reverse=True)

    Stage().play(scene)


def test_the_filter() -> None:
    async def scene(stage: Stage) -> None:
        await stage.look(*lab())
        await stage.press("slash", *"soak", "enter")
        assert stage.names() == ["gpus"] and stage.status().endswith("by waiters; only with 'soak'")
        assert stage.detail().startswith("'gpus'")
        await stage.press("s", "r")  # the keys are the table's again
        assert stage.status().startswith("1 resources, 1 in use, 1 wait; by taken/s, reversed")
        await stage.press("slash", *"qrs")
        assert stage.names() == [] and stage.top.words.value == "qrs" and stage.detail() == ""
        await stage.press("escape")
        assert len(stage.names()) == 5 and "only" not in stage.status()

    Stage().play(scene)


def test_the_line_of_the_last_minute() -> None:
    async def scene(stage: Stage) -> None:
        for contended in (0, 5, 5, 50):
            await stage.look(resource("r1", contended=contended, acquisitions=contended))
        rates = stage.top.contended.data
        assert rates is not None and len(rates) == 3 and rates[1] == 0 < rates[0] and rates[2] > 0
        assert str(stage.top.table.get_row_at(0)[6]) != ""

    Stage().play(scene)


def test_a_look_that_does_not_end_stops_no_key() -> None:
    async def scene(stage: Stage) -> None:
        await stage.look(*lab())
        assert stage._looks.empty()  # the thread is in a look, and stays there
        await stage.press("s", "down", "slash", *"bed")
        assert "by taken/s; only with 'bed'" in stage.status()
        await stage.press("escape", "q")
        assert not stage.top.is_running or stage.top._exit

    Stage().play(scene)


def test_a_look_that_fails_is_shown_and_the_next_one_comes() -> None:
    async def scene(stage: Stage) -> None:
        await stage.look(*lab())
        await stage.fail(PermissionError("no"))
        assert stage.status() == "cannot look: PermissionError: no" and len(stage.names()) == 5
        await stage.look(*lab())
        assert "cannot" not in stage.status()

    Stage().play(scene)


def test_names_are_shown_as_they_are() -> None:
    async def scene(stage: Stage) -> None:
        await stage.look(resource("[red]x[/]\x1b[31m"))
        assert stage.names() == ["[red]x[/] [31m"] and "[red]x[/]" in stage.detail()

    Stage().play(scene)


def test_on_a_terminal_it_runs_and_ends() -> None:
    with Lockable(lock_name="lab/r1"), commands.Terminal([*commands.COHELD, "top"]) as terminal:
        terminal.resize(30, 120)
        terminal.expect("lab/r1")
        terminal.type("q")
        assert terminal.news() == "ended 0"


def test_who_quits_does_not_wait_for_a_look() -> None:
    source = "import threading; from coheld.cli.screen import Top; Top(lambda: threading.Event().wait() or []).run()"
    with commands.Terminal([sys.executable, "-c", source]) as terminal:
        terminal.expect("a moment")
        terminal.type("q")
        assert terminal.news() == "ended 0"


def test_without_a_terminal_or_textual_it_says_so() -> None:
    done = commands.coheld("top")
    assert (done.returncode, done.stdout) == (exits.FAILED, "")
    assert done.stderr == "coheld: top needs a terminal; coheld ps does not\n"
    source = "import sys; sys.modules['textual'] = None; sys.stderr = sys.stdout; from coheld.cli import main"
    said = procs.run(f"{source}; assert main(['top']) == {exits.FAILED}")
    assert said.startswith("coheld: top is drawn by textual (") and said.endswith("pip install 'coheld[top]'\n")
