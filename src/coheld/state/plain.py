"""The half of a View (view.py) that is C beside the native mutex: the caches of this process, and the marks.

inside      by the owner: values, the stamps of what they were made from, and marks of what he may have changed
outside     for everybody else: values as they were committed, containers frozen, each with the word at which it was
            last seen to be current

What C does in one step is a run of statements without a call here, where no signal's handler and no other thread that
has the GIL comes in between: see backends/stateful.py.  A value that is replaced is kept until the end of the function:
its __del__ may come back here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from ..errors import IncompatibleError
from ..native import REMOVED
from .shapes import ASSIGNED, HANDED, MUTABLE
from .slots import Entry, StateFile, TornError
from .store import generation_of

_CLEAN, _STORING = 0, 4
_UNKNOWN: Any = object()


class Plain:
    """As _native.View: see _state.h for what its methods mean."""

    cell: Any
    schema: Any
    remote: bool
    _kinds: bytes
    _values: list[Any]
    _stamps: list[int]
    _marks: list[int]
    _word_inside: int
    """What the values are of."""
    _seen: list[tuple[Any, int, int] | None]
    """Outside: values, their stamps, and the words."""

    if TYPE_CHECKING:
        lock: Any

        def _load(self, index: int) -> Any: ...
        def _read(self, index: int) -> Any: ...
        def _seen_by_owner(self, index: int) -> Any: ...
        def _live_entries(self) -> Sequence[Entry | None]: ...
        def _file(self, generation: int) -> StateFile: ...
        def _index(self, state: StateFile) -> list[int | None]: ...

    def __new__(cls, lock: Any, schema: Any, kinds: bytes, _limit: int, /) -> Self:
        self = super().__new__(cls)
        self.cell, self.schema, self._kinds = lock._place(), schema, kinds
        count = len(kinds)
        self._values, self._stamps, self._marks = [_UNKNOWN] * count, [0] * count, [_CLEAN] * count
        self._word_inside, self._seen = 0, [None] * count
        return self

    def _word(self) -> int:
        return int(self.cell.version)

    def _begin(self) -> int:
        return int(self.cell.version)

    def _flip(self, word: int) -> None:
        """The commit. By the owner."""
        lock = self.lock()
        if lock is None or not lock._owns(self.cell):
            raise RuntimeError("a commit without the lock")
        self.cell.version = word  # _refresh looks which values are of that

    # -- inside --------------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """By the owner: where the word has moved, values of other entries than the live ones are dropped."""
        word = self.cell.version
        if word == self._word_inside:
            return
        values, stamps, marks = self._values, self._stamps, self._marks
        dropped = []
        for index, entry in enumerate(self._live_entries()):
            if not marks[index] and (entry is None or entry.stamp != stamps[index]):
                dropped += [values[index]]
                values[index] = _UNKNOWN
        self._word_inside = word

    def _peek(self, index: int) -> Any:
        """The owner's value, not handed out."""
        self._refresh()
        value = self._values[index]
        if value is not _UNKNOWN:
            return value
        entry = self._live_entries()[index]
        value, stamp = self._load(index), entry.stamp if entry else 0
        if self._values[index] is _UNKNOWN:  # else a signal's handler was here meanwhile
            self._values[index], self._stamps[index] = value, stamp
        return self._values[index]

    def _value_inside(self, obj: object, index: int) -> Any:
        """The value as it is in the critical section.  A guard looks at what was committed; in a nested call, where
        there may be more, at that, and at a copy of what could be changed."""
        lock = self.lock()
        if lock.guarding and not lock.pending:
            return self._current_value(index)
        if lock.guarding and self._kinds[index] & MUTABLE:
            return self._seen_by_owner(index)
        self._peek(index)
        if not self._kinds[index] & MUTABLE:
            return self._values[index]
        lock._touch(self)
        value = self._values[index]
        if value is _UNKNOWN:  # a signal's handler has dropped it
            return self._value_inside(obj, index)
        self._marks[index] = ASSIGNED if self._marks[index] & ASSIGNED else HANDED
        return value

    def _assign(self, index: int, value: object, mark: int) -> None:
        self._refresh()
        _old = self._values[index]
        self._values[index], self._marks[index] = value, mark

    def _touched(self) -> bool:
        """Is anything marked?"""
        return any(self._marks)

    def _marked(self, storing: bool) -> list[tuple[int, int, Any]]:
        """(index, mark, value) of each; storing: for a commit, which then says _keep or _drop."""
        found, marks, values = [], self._marks, self._values
        for index in range(len(marks)):
            if mark := marks[index]:
                if storing:
                    marks[index] = mark | _STORING
                found += [(index, mark & ~_STORING, values[index])]
        return found

    def _keep(self, index: int, value: object, stamp: int) -> bool:
        """Clean from now on, unless it was touched since the commit looked at it."""
        if not self._marks[index] & _STORING:
            return False
        _old = self._values[index]
        self._marks[index] = _CLEAN
        self._values[index], self._stamps[index] = value, stamp
        return True

    def _drop(self, index: int, always: bool) -> None:
        """Clean, and to be loaded when it is wanted; not always: as _keep."""
        if always or self._marks[index] & _STORING:
            _old = self._values[index]
            self._marks[index], self._values[index] = _CLEAN, _UNKNOWN

    def _discard(self) -> None:
        """What was not committed never was."""
        for index in range(len(self._marks)):
            if self._marks[index]:
                self._drop(index, True)

    # -- outside -------------------------------------------------------------------------------------------------------

    def _current_value(self, index: int) -> Any:
        """The value of the last commit, for everybody."""
        seen, word = self._seen[index], self._word()
        if seen is None or self.cell.flags & REMOVED:
            return self._read(index)
        value, stamp, at = seen
        if at == word:
            return value
        if self._stamp_of(index, word) != stamp:
            return self._read(index)
        self._publish(index, value, stamp, word)
        return value

    def _stamp_of(self, index: int, word: int) -> int | None:
        """Of a field under that word; None: it cannot be seen now."""
        try:
            state = self._file(generation_of(word))
            place = self._index(state)[index]
            return None if place is None else state.entries(word)[place].stamp
        except (FileNotFoundError, TornError, IncompatibleError):
            return None

    def _publish(self, index: int, value: object, stamp: int, word: int) -> None:
        """What a reader found."""
        self._seen[index] = (value, stamp, word)
