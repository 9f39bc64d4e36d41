"""The demo as rich draws it: a live table of the devices, what has happened, and the end tables."""

from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coheld.cli import display
from coheld.cli.report import Moment, Plan, Report, Use

_EVENTS = 8  # lines
_COLORS = ("cyan", "green", "magenta", "yellow", "blue", "bright_red")


class LiveView(display.View):
    """The same as the plain view, drawn. No thread: a worker must not be forked beside one."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.console = Console(highlight=False)
        self.events: deque[Text] = deque(maxlen=_EVENTS)
        self.live = Live(console=self.console, auto_refresh=False, redirect_stderr=False, transient=True)

    def __enter__(self) -> Self:
        self.console.print(Text(display.headline(self.plan), style="bold"))
        self.console.print(Text(f"backend {self.plan.place}; seed {self.plan.seed}", style="dim"))
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.live.stop()

    def show(self, moment: Moment) -> None:
        """Draw the testbed."""
        parts = [_clock(self.plan, moment), _devices(moment), *self.events]
        self.live.update(Padding(Group(*parts), (1, 0, 0, 0)), refresh=True)

    def note(self, elapsed: float, text: str) -> None:
        """One more event; the oldest scrolls away."""
        style = "bold red" if text.startswith("SIGKILL") else "green"
        self.events.append(Text.assemble((f"{elapsed:5.1f} s  ", "dim"), (text, style)))

    def close(self, report: Report) -> None:
        """The end tables, and the outcome."""
        self.console.print(*self.events, sep="\n")
        self.console.print(_end_table(display.device_table(report)))
        self.console.print(_end_table(display.worker_table(report), _bars(report)))
        self.console.print(Text(display.verdict(report), style="bold green" if report.good else "bold red"))
        for mishap in report.mishaps:
            self.console.print(Text(f"wrong: {mishap}", style="bold red"))


def _clock(plan: Plan, moment: Moment) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=plan.seconds, completed=min(moment.elapsed, plan.seconds), width=40)
    line.add_row(bar, f"{moment.elapsed:4.1f} of {plan.seconds:g} s", f"{moment.kills} of {plan.kills} killed")
    return line


def _devices(moment: Moment) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head, width in (("device", 8), ("held by", 14), ("in", 9)):  # in all, it fits into 80 columns
        table.add_column(head, min_width=width)
    for head, width in (("for", 6), ("waiting", 7), ("calls", 6), ("recovered", 9)):
        table.add_column(head, min_width=width, justify="right")
    for use in moment.uses:
        table.add_row(*_use(use))
    return table


def _use(use: Use) -> list[RenderableType]:
    holder = Text("free", style="dim")
    if use.worker:
        holder = Text.assemble((use.worker, f"bold {_color(use.worker)}"), (f"  pid {use.pid}", "dim"))
    held = display.milliseconds(use.held) if use.worker else ""
    waiting = Text("•" * min(use.waiters, 12), style="yellow")
    return [Text(use.device, style="bold"), holder, use.method, held, waiting, f"{use.calls:,}", str(use.recoveries)]


def _color(worker: str) -> str:
    return _COLORS[int(worker.lstrip("w") or 0) % len(_COLORS)] if worker.lstrip("w").isdigit() else "white"


def _end_table(rows: list[list[str]], bars: Sequence[RenderableType] = ()) -> Table:
    """A table with its head in the first row, and perhaps a column of bars after the last."""
    table = Table(rows[0][0], box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for head in rows[0][1:]:
        table.add_column(head, justify="right")
    for cells, bar in zip_longest(rows[1:], bars, fillvalue=""):
        row = (Text(cell, style=_cell_style(cell)) for cell in cells)
        table.add_row(*row, bar, style="bold" if cells[0] == display.ALL else "")
    return table


def _cell_style(cell: str) -> str:
    return "green" if cell == "exact" else "bold red" if cell.startswith("WRONG") else ""


def _bars(report: Report) -> list[RenderableType]:
    largest = max(one.made for one in report.workers) or 1
    return [ProgressBar(total=largest, completed=one.made, width=24) for one in report.workers]
