"""A resource in words: what is seen of it, and of the processes that have it or wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from .backends.survey import Resource
from .process import command_of, printable

_NAMED = 100
"""So many of those who wait are named."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A resource, as it was at a time of time.monotonic(), and what the system said of its processes then.

    holder, method: who has it, in short, and in which locked method; empty where nobody has.  held: for how many
    seconds; None where that is not known.  who: a line for each that has it or waits for it.
    """

    resource: Resource
    when: float
    holder: str
    method: str
    held: float | None
    who: tuple[str, ...]

    @property
    def name(self) -> str:
        """As tables have it; without a name, its class and its place."""
        one = self.resource
        return printable(f"{one.class_name} ({one.called})" if one.class_name else one.called)

    def lines(self) -> list[str]:
        """All that is known."""
        one = self.resource
        counted = f"taken {one.acquisitions} times, {one.contended} had to wait, {one.recoveries} deaths"
        return [f"{one.label}, a {one.kind} on {one.backend}:", f"  {counted}", *(f"  {line}" for line in self.who)]


def see(one: Resource) -> Sight:
    """Looks at the processes now; reads nothing of the lock, and never waits for it."""
    now = time.monotonic()
    who = tuple(map(printable, _who(one)))
    if one.kind != "lock" or (one.inside and one.holder is None):
        return Sight(one, now, _several(one), "", None, who)
    if one.holder is None:
        return Sight(one, now, "", "", None, who)
    held = max(0.0, now - one.holder.since) if one.holder.since else None
    what = f"on {one.holder.host}" if one.holder.host else one.holder.command[:40]
    holder = printable(f"{one.holder.pid} {what}")
    return Sight(one, now, holder, printable(one.holder.method), held, who)


def _several(one: Resource) -> str:
    """Of the processes that read it, or have permits or leases."""
    taken = sum(one.inside.values())
    counted = "readers" if one.kind == "lock" else f"{one.part}s"
    what = f"{taken} of {one.permits} permits" if one.permits is not None else f"{taken} {counted}"
    return f"{what}: {', '.join(map(str, one.inside))}" if one.inside else what


def _who(one: Resource) -> Iterator[str]:
    if one.holder is not None:
        yield f"held by {one.holder}"
    for pid, count in one.inside.items():
        yield f"{count} {one.part}s: process {pid} ({command_of(pid)})"
    for waiter in one.waiting[:_NAMED]:
        yield f"waits: {waiter}"
    if more := max(one.waiters, len(one.waiting)) - min(len(one.waiting), _NAMED):
        yield f"waits: {more} more, not named"
