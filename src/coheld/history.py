"""How resources have been used in the last minute: what coheld top shows, made of one look after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from .sight import Sight

SECONDS = 60
"""So far back a history goes."""


@dataclass(frozen=True, slots=True)
class Row:
    """taken, contended: times per second, between the last two looks; 0 where there was only one."""

    sight: Sight
    taken: float = 0.0
    contended: float = 0.0


@dataclass(frozen=True, slots=True)
class _Counts:
    when: float
    taken: int
    contended: int

    def rates_to(self, after: _Counts) -> tuple[float, float]:
        """A counter that goes back has begun again: a new resource has come into that place."""
        passed = after.when - self.when
        taken, contended = (
            new - old if new >= old else new
            for old, new in ((self.taken, after.taken), (self.contended, after.contended))
        )
        return (taken / passed, contended / passed) if passed > 0 else (0.0, 0.0)


_Key = Callable[[Row], object]
COLUMNS: dict[str, tuple[_Key, bool]] = {
    "resource": (lambda row: row.sight.name.casefold(), False),
    "holder": (lambda row: (not row.sight.holder, row.sight.holder.casefold()), False),
    "in": (lambda row: (not row.sight.method, row.sight.method.casefold()), False),
    "for": (lambda row: -1.0 if row.sight.held is None else row.sight.held, True),
    "waiters": (lambda row: row.sight.resource.waiters, True),
    "taken/s": (lambda row: row.taken, True),
    "contended/s": (lambda row: row.contended, True),
    "deaths": (lambda row: row.sight.resource.recoveries, True),
}
"""By what rows can be sorted, and whether the largest are first."""


class History:
    """Of one thread: it is not for several at once."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._counts: dict[str, deque[_Counts]] = {}

    def add(self, sights: Iterable[Sight]) -> None:
        """All that one look has seen, in the order that those have which are equal. What is gone is forgotten."""
        counts, rows = {}, []
        for sight in sights:
            one = sight.resource
            kept = self._counts.get(one.place, deque())
            kept.append(_Counts(sight.when, one.acquisitions, one.contended))
            while kept[0].when < sight.when - SECONDS:
                kept.popleft()
            counts[one.place] = kept
            rows.append(Row(sight, *(kept[-2].rates_to(kept[-1]) if len(kept) > 1 else ())))
        self._counts, self._rows = counts, rows

    def rows(self, column: str = "waiters", reverse: bool = False, words: str = "") -> list[Row]:
        """Those in which the words are found, sorted by a column of COLUMNS."""
        key, largest_first = COLUMNS[column]
        found = [row for row in self._rows if words.casefold() in _text(row.sight)]
        return sorted(found, key=key, reverse=largest_first != reverse)  # type: ignore[arg-type]

    def contended(self, place: str) -> list[float]:
        """How often somebody had to wait, times per second, between all looks of the last minute, the oldest first."""
        kept = self._counts.get(place, ())
        return [before.rates_to(after)[1] for before, after in pairwise(kept)]


def _text(sight: Sight) -> str:
    return "\n".join((sight.name, sight.holder, sight.method, *sight.who)).casefold()
