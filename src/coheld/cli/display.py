"""The demo on a screen: plain lines here, and what rich draws in drawing.py, which is imported on a terminal only."""

import sys
from types import TracebackType
from typing import Self

from coheld.cli.report import Moment, Plan, Report, Use

ALL = "all"  # the label of a row of sums

_EVERY = 1.0  # seconds between two plain lines


class View:
    """Plain lines on standard output. The other views have the same methods."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.next_line = _EVERY

    def __enter__(self) -> Self:
        self.say(headline(self.plan))
        self.say(f"backend {self.plan.place}; seed {self.plan.seed}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """The course is over, well or not."""

    def show(self, moment: Moment) -> None:
        """The testbed now; called several times a second."""
        if moment.elapsed >= self.next_line:
            self.next_line += _EVERY
            self.note(moment.elapsed, " | ".join(_use(use) for use in moment.uses))

    def note(self, elapsed: float, text: str) -> None:
        """Something has happened."""
        self.say(f"{elapsed:5.1f} s  {text}")

    def close(self, report: Report) -> None:
        """The end table."""
        for table in (device_table(report), worker_table(report)):
            self.say()
            for line in _aligned(table):
                self.say(line)
        self.say()
        self.say(verdict(report))
        for mishap in report.mishaps:
            self.say(f"wrong: {mishap}")

    def say(self, line: str = "") -> None:
        """One line, at once."""
        print(line, flush=True)


def view(plan: Plan, plain: bool) -> View:
    """A live display on a terminal; plain lines elsewhere, where they are asked for, and without rich."""
    if plain or not sys.stdout.isatty():
        return View(plan)
    try:
        from coheld.cli.drawing import LiveView
    except ModuleNotFoundError as error:
        print(f"coheld: no live display ({error}): pip install 'coheld[cli]'", file=sys.stderr)
        return View(plan)
    return LiveView(plan)


# ---- words and tables, for every view ------------------------------------------------------------------------------


def plural(count: int, noun: str) -> str:
    """The number with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def headline(plan: Plan) -> str:
    """What will be seen."""
    workers, devices = plural(plan.workers, "worker"), plural(plan.devices, "device")
    kills = f", {plural(plan.kills, 'holder')} will be killed" if plan.kills else ""
    return f"coheld demo: {workers} share {devices} for {plan.seconds:g} s{kills}"


def _use(use: Use) -> str:
    who = f"{use.worker} in {use.method}" if use.worker else "free"
    return f"{use.device}: {who}, {use.waiters} waiting, {plural(use.calls, 'call')}"


def milliseconds(seconds: float) -> str:
    """A short time."""
    return f"{1000 * seconds:,.0f} ms"


def device_table(report: Report) -> list[list[str]]:
    """The devices' rows, under a head, over a sum."""
    head = ["device", "calls made", "calls counted", "", "holders killed", "recoveries"]
    rows = [
        [
            one.device,
            f"{one.made:,}",
            f"{one.counted:,}",
            _compared(one.made, one.counted),
            str(one.kills),
            str(one.recoveries),
        ]
        for one in report.devices
    ]
    compared = _compared(report.made, report.counted)
    total = [ALL, f"{report.made:,}", f"{report.counted:,}", compared, str(report.kills), str(report.recoveries)]
    return [head, *rows, total]


def _compared(made: int, counted: int) -> str:
    return "exact" if made == counted else f"WRONG by {counted - made:+d}"


def worker_table(report: Report) -> list[list[str]]:
    """The workers' rows, under a head."""
    rows = [
        [one.worker, f"{one.made:,}", f"{100 * report.share(one):.1f} %", str(one.kills), milliseconds(one.waited)]
        for one in report.workers
    ]
    return [["worker", "calls made", "share", "times killed", "longest wait"], *rows]


def verdict(report: Report) -> str:
    """The outcome in one sentence."""
    compared = "exactly" if report.exact else "NOT"
    return (
        f"{plural(report.made, 'call')} made, {compared} {report.counted:,} counted; "
        f"{plural(report.kills, 'holder')} killed, {report.recoveries} recovered from; "
        f"longest wait {milliseconds(report.waited)}"
    )


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
