"""What this process knows of one resource's state: what _state.h says, but for caches and marks.  Those are C beside a
native mutex, and plain.py beside a lock of files: a process may have both."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from .. import native
from ..errors import IncompatibleError, StateError
from . import store, stored
from .frozen import thaw
from .plain import Plain
from .schema import Schema, Snapshot, Spec
from .shapes import ASSIGNED, HANDED
from .slots import CHECKED, MAPPED, SHORT, UNDECODABLE, Entry, MappedFile, StateFile, TornError
from .undoing import Former

if TYPE_CHECKING:
    from .._native import View as _Half
    from ..backends.base import Handle
else:
    _Half = object

_TURN = 0.01
"""For how long it then waits for the lock, seconds."""


class View(_Half):
    """One per resource and process (and schema): this and its other half.  Methods that begin with an underscore are
    called by that, or by Handle."""

    schema: Schema
    magic: bytes
    """Of its files."""

    def __new__(cls, lock: Handle, schema: Schema, siblings: list[View]) -> Self:
        return super().__new__(cls, lock, schema, schema.kinds, schema.max_state)

    def __init__(self, lock: Handle, schema: Schema, siblings: list[View]) -> None:
        self.siblings = siblings  # all of the lock's: one that was replaced may still be read from
        siblings.append(self)
        self.lock = weakref.ref(lock)
        self.label = lock.label
        self.resource: str = lock.segment.path
        self.identity: tuple[int, int] = lock.segment.identity
        self.offset = lock.offset
        self.inside_file: StateFile | None = None
        self.files: dict[int, StateFile] = {}
        self.handed: dict[int, bytes] = {}  # encodings of what the owner has got, as it was when he got it

    # -- files ---------------------------------------------------------------------------------------------------------

    def _file(self, generation: int) -> StateFile:
        if (state := self.files.get(generation)) is None:
            state = store.opened(self.resource, self.identity, self.offset, generation)
            self._check(state)
            self.files = {generation: state}
        return state

    def _check(self, state: StateFile) -> None:
        """Raises: IncompatibleError: if the state has fields that this class has not, or of other types, or is of the
        other kind."""
        if state.head.magic != self.magic:
            raise self._damaged("it is of another kind")
        self._check_fields(state.fields)

    def _check_fields(self, fields: Mapping[str, str]) -> None:
        """As _check, of names and types."""
        for name, text in fields.items():
            if (ours := self.schema.texts.get(name)) is None:
                why = f"it has a field {name}: {text}, which {self.schema.title} has not"
            elif ours != text:
                why = f"{name} is {text} there, and {ours} in {self.schema.title}"
            else:
                continue
            raise IncompatibleError(f"the state of {self.label} is of another schema: {why}", resource=self.label)

    def _map_for(self, outside: bool, state: StateFile) -> None:
        """The other half, if it reads files by itself, reads this one from now on."""

    def _index(self, state: StateFile) -> list[int | None]:
        """For each field, its place in the file; None where the file is of an older class and has none."""
        places = {name: place for place, name in enumerate(state.fields)}
        return [places.get(name) for name in self.schema.names]

    def _same(self, state: StateFile) -> bool:
        return tuple(state.fields) == self.schema.names

    def _damaged(self, error: object) -> IncompatibleError:
        return IncompatibleError(f"the state of {self.label} is damaged: {error}", resource=self.label)

    def _unlink(self) -> None:
        """The last who knew the resource leaves it."""
        generation = store.generation_of(self._word())
        store.remove(self.resource, self.offset, generation + 1)
        store.remove(self.resource, self.offset, generation)
        self.siblings.clear()  # they refer to each other: else the memory of the file waits for the collector

    def _copy_to(self, lock: Any) -> None:
        """Give a new resource this state, as this thread sees it."""
        values = self._current()._snapshot_values()
        view = self.schema.bind(lock)
        with lock:
            for index, value in enumerate(values):
                lock._put(index, thaw(value), ASSIGNED)
            view._commit(made=True)
            lock._discard()

    # -- the owner -----------------------------------------------------------------------------------------------------

    def _enter(self, word: int) -> None:
        """The word names another file than the one that is mapped."""
        self.inside_file = self._file(store.generation_of(word))
        self._map_for(outside=False, state=self.inside_file)

    def _file_inside(self) -> StateFile | None:
        """The live file, for the owner; None: nothing was committed.  An exception of a signal's handler may have hit
        between a commit that grew the state and the look at its file."""
        word = self._begin()
        generation = store.generation_of(word)
        if generation and (self.inside_file is None or self.inside_file.head.generation != generation):
            self._enter(word)
        return self.inside_file if generation else None

    def _live(self, index: int) -> tuple[int, bytes] | None:
        """Stamp and bytes of a field, as the owner finds them; None: there are none yet."""
        if (entry := self._live_entries()[index]) is None or self.inside_file is None:
            return None
        try:
            return entry.stamp, self.inside_file.raw(entry)
        except (FileNotFoundError, TornError) as error:
            raise self._damaged(error) from None

    def _live_entries(self) -> Sequence[Entry | None]:
        """Those of the last commit, for the owner."""
        if (state := self._file_inside()) is None:
            return [None] * len(self.schema.specs)
        try:
            return self._chosen(state, self._begin(), range(len(self.schema.specs)))
        except (FileNotFoundError, TornError) as error:
            raise self._damaged(error) from None

    def _chosen(self, state: StateFile, word: int, indices: Sequence[int]) -> list[Entry | None]:
        entries, places = state.entries(word), self._index(state)
        return [None if (place := places[index]) is None else entries[place] for index in indices]

    def _load(self, index: int) -> Any:
        """The value of the last commit, for the owner.  A default that is another one each time is that of the resource
        from here on."""
        spec, live = self.schema.specs[index], self._live(index)
        value = self._decoded(spec, live[1]) if live else spec.default()
        if live is None and spec.is_drawn(value) and (lock := self.lock()) is not None and lock.view is self:
            lock._put(index, value, ASSIGNED)
        if spec.shape.mutable:
            # a set is encoded in the order of its hashes, which each process has of its own
            trusted = live is not None and not spec.shape.unordered
            self.handed[index] = live[1] if live and trusted else spec.encode(value)
        return value

    def _decoded(self, spec: Spec, raw: bytes) -> Any:
        try:
            return spec.decode(raw)
        except UNDECODABLE as error:
            raise self._damaged(error) from error

    # -- the commit ----------------------------------------------------------------------------------------------------

    def _commit(self, made: bool = False) -> None:
        """By the owner: what it has changed becomes the last commit.

        Raises: StateError: if it does not fit its schema, or is too large.  OSError: if there is no room.  The last
        commit stands then.
        """
        marked = self._marked(True)
        changed, fresh = self._changed(marked)
        if changed:
            self._put_down(changed, made)
        stamp = store.number_of(self._begin())
        for index, _mark, value in marked:
            self._settle(index, fresh.get(index, value), changed.get(index), stamp)

    def _put_down(self, changed: dict[int, bytes], made: bool) -> None:
        """By the owner: these encodings become part of the last commit. Raises: as _commit."""
        word = self._begin()
        try:
            written = self._write(word, changed, made)
        except (FileNotFoundError, TornError) as error:
            raise self._damaged(error) from None
        if not written:
            self._grow(word, changed, made)

    def _has_changed(self) -> bool:
        return bool(self._changed(self._marked(False))[0])

    def _changed(self, marked: Sequence[tuple[int, int, Any]]) -> tuple[dict[int, bytes], dict[int, Any]]:
        """The new encodings of what is not as it was, and what they decode to: no reader will refuse that."""
        changed: dict[int, bytes] = {}
        fresh: dict[int, Any] = {}
        for index, mark, value in marked:
            spec = self.schema.specs[index]
            raw = spec.encode(value)
            if raw != self._before(index, mark):
                fresh[index] = spec.as_read(value, raw) if spec.shape.mutable else value
                changed[index] = raw
        return changed, fresh

    def _before(self, index: int, mark: int) -> bytes | None:
        if mark == HANDED:
            return self.handed[index]
        live = self._live(index)
        return live[1] if live else None

    def _settle(self, index: int, value: Any, raw: bytes | None, stamp: int) -> None:
        """Containers are the owner's from now on: the next one gets a new one.  What was touched since the commit
        looked at it stays marked; what it is compared with then is what was committed now."""
        spec = self.schema.specs[index]
        if raw is None:
            live = self._live(index)
            if spec.shape.mutable:
                self._drop(index, False)
            else:
                self._keep(index, value, live[0] if live else 0)
            return
        if spec.shape.mutable:
            self.handed[index] = spec.encode(value) if spec.shape.unordered else raw
        self._keep(index, value, stamp)

    def _write(self, word: int, changed: dict[int, bytes], made: bool) -> bool:
        """Into the file that is there. False: they do not fit, or it is of an older class; nothing was done."""
        state = self._file_inside()
        if state is None or not self._same(state):
            return False
        entries = list(state.entries(word))
        long = {index: raw for index, raw in changed.items() if len(raw) > SHORT}
        places = state.room_for(entries, list(long.values()))
        self._check_size([changed.get(index, entry) for index, entry in enumerate(entries)])
        if places is None:
            return False
        word = store.next_word(word, made)
        stamp = store.number_of(word)
        place_of = dict(zip(long, places, strict=True))
        for index, raw in changed.items():
            entries[index] = state.store(stamp, raw, place_of.get(index, 0))
        state.put_entries(word, entries)
        self._flip(word)
        state.confirm(word, entries)
        return True

    def _check_size(self, fields: Sequence[bytes | Entry]) -> None:
        size = sum(one.length if isinstance(one, Entry) else len(one) for one in fields)
        if size > self.schema.max_state:
            raise StateError(
                f"the state of {self.label} would have {size:,} bytes, and may have {self.schema.max_state:,}: "
                f"class {self.schema.title}(Lockable, max_state=…) says how many",
                resource=self.label,
            )

    def _grow(self, word: int, changed: dict[int, bytes], made: bool) -> None:
        """Into a new file, of the next generation and with all fields of this class."""
        word = store.next_word(word, made, grown=True)
        stamp = store.number_of(word)
        fields = [self._field_for(index, stamp, changed.get(index)) for index in range(len(self.schema.specs))]
        self._check_size([raw for _, raw in fields])
        former = self._former_heap(store.generation_of(word))
        where = self.resource, self.identity, self.offset
        state = store.made(*where, word, self.schema.record, fields, former, self.magic)
        self._flip(word)
        self.files = {state.head.generation: state}
        self.inside_file = state
        self._map_for(outside=False, state=state)
        store.remove(self.resource, self.offset, state.head.generation - 1)

    def _former_heap(self, generation: int) -> int:
        """Of the file that is left. Raises: StateError: if there cannot be another."""
        if generation > store.GENERATIONS:
            raise StateError(
                f"the state of {self.label} was moved to a larger file {store.GENERATIONS:,} times, which is all that "
                "can be counted: remove the resource and make it anew",
                resource=self.label,
            )
        state = self._file_inside()
        return state.head.size - state.head.heap if state else 0

    def _field_for(self, index: int, stamp: int, raw: bytes | None) -> tuple[int, bytes]:
        if raw is not None:
            return stamp, raw
        spec = self.schema.specs[index]
        return self._live(index) or (stamp, spec.encode(self._peek(index)))

    # -- atomic --------------------------------------------------------------------------------------------------------

    def _save(self) -> tuple[int, dict[int, tuple[int, Any, Former | None]]]:
        """What the owner has touched so far, as it is now, and the commit that it is on top of."""
        specs = self.schema.specs
        return self._begin(), {
            index: (mark, value, Former(value) if specs[index].shape.mutable else None)
            for index, mark, value in self._marked(False)
        }

    def _undo(self, saved: tuple[int, dict[int, tuple[int, Any, Former | None]]]) -> None:
        """Make it so again. Whatever the caller may have kept is the same object as before, and as it was."""
        word, fields = saved
        for index, _mark, _value in self._marked(False):
            if index not in fields or word != self._begin():
                self._drop(index, True)
        if word != self._begin():  # a wait in between has committed what was there
            return
        lock: Any = self.lock()
        for index, (mark, value, former) in fields.items():
            if former is not None:
                former.restore()
            lock._put(index, value, mark)

    # -- readers -------------------------------------------------------------------------------------------------------

    def _read(self, index: int) -> Any:
        """One field of the last commit; never waits for a holder."""
        view, word, (found,) = self._current()._committed([index])
        value = view._shown(index, found)
        if not view.schema.specs[index].shape.copied:
            view._publish(index, value, found[0] if found else 0, word)
        return value

    def _current(self) -> View:
        """This, or the view of what the name means now, if the resource was removed."""
        lock: Any = self.lock()
        if lock is None or not lock.flags & native.REMOVED:
            return self
        view: View = self.schema.bind(lock)
        return view

    def _shown(self, index: int, found: tuple[int, bytes] | None) -> Any:
        spec = self.schema.specs[index]
        return spec.frozen(self._decoded(spec, found[1]) if found else spec.default())

    def _committed(self, indices: Sequence[int]) -> tuple[View, int, list[tuple[int, bytes] | None]]:
        """Stamps and bytes of these fields in one commit, its word, and whose it is: the resource may be removed in the
        middle of the look, and its files are gone then, or another's."""
        try:
            return self, *store.consistently(self._word, lambda word: self._copied(word, indices), self._ask_for_quiet)
        except (FileNotFoundError, TornError, IncompatibleError) as error:
            lock = self.lock()
            view: View = self.schema.bind(lock) if lock else self
            if view is not self:
                return view._committed(indices)
            if isinstance(error, IncompatibleError):
                raise
            raise self._damaged(error) from None

    def _copied(self, word: int, indices: Sequence[int]) -> list[tuple[int, bytes] | None]:
        generation = store.generation_of(word)
        if not generation:
            return [None] * len(indices)
        state = self._file(generation)
        if generation != getattr(self, "_outside", 0):
            self._map_for(outside=True, state=state)
            self._outside = generation
        chosen = self._chosen(state, word, indices)
        return [None if entry is None else (entry.stamp, state.raw(entry)) for entry in chosen]

    def _ask_for_quiet(self) -> None:
        """Commits came so fast that every look was overtaken: wait for a moment with the lock, in which none comes."""
        lock: Any = self.lock()
        if lock is not None and lock.acquire(timeout=_TURN):
            lock.release()

    def _snapshot(self) -> Snapshot:
        """All fields: of the last commit; for the owner, as he has them now."""
        view = self._current()
        return Snapshot(view.schema.title, dict(zip(view.schema.names, view._snapshot_values(), strict=True)))

    def _snapshot_values(self) -> list[Any]:
        lock = self.lock()
        indices = range(len(self.schema.specs))
        if lock is not None and lock._mine():
            return [self._seen_by_owner(index) for index in indices]
        _, _, found = self._committed(indices)
        return [self._shown(index, one) for index, one in zip(indices, found, strict=True)]

    def _seen_by_owner(self, index: int) -> Any:
        spec, value = self.schema.specs[index], self._peek(index)
        return spec.frozen(spec.decoded(spec.encode(value))) if spec.shape.mutable else value


class PlainView(View, Plain):
    """Beside a lock of files."""

    magic = CHECKED


if not native.missing:

    class NativeView(View, native.View):
        """Beside a native mutex."""

        magic = MAPPED

        def _map_for(self, outside: bool, state: StateFile) -> None:
            assert isinstance(state, MappedFile)
            memory = state.segment if self._same(state) else None
            self._map(outside, memory, state.head.generation, *state.slots)

        def _value_inside(self, obj: object, index: int) -> Any:
            """As it is in the critical section, for the owner."""
            return getattr(obj, self.schema.names[index])


class FarView(View):
    """Of a lock that a store has: the files are a copy of what that has.  Before the other half."""

    def __init__(self, lock: Handle, schema: Schema, siblings: list[View]) -> None:
        super().__init__(lock, schema, siblings)
        self.outside: tuple[object, dict[str, bytes]] = None, {}  # the state that was read last
        self.shown: dict[int, tuple[bytes | None, Any]] = {}
        self.remote = True  # to the half that is C: it neither commits nor reads for others by itself

    def _put_down(self, changed: dict[int, bytes], made: bool) -> None:
        """The store first, which alone says whether that can be; then the copy."""
        away: Any = self.lock().away  # type: ignore[union-attr]  # its owner calls
        version = away.change(self._payload(changed), made)
        super()._put_down(changed, made)
        away.mirrored(version)

    def _changed_payload(self) -> bytes | None:
        """By the owner: what a commit would tell the store now; None: nothing. Raises: as a commit."""
        changed, _ = self._changed(self._marked(False))
        return self._payload(changed) if changed else None

    def _payload(self, changed: dict[int, bytes]) -> bytes:
        """All fields, as they go to the store. Raises: StateError: if they are too large."""
        fields = [self._field_for(index, 0, changed.get(index))[1] for index in range(len(self.schema.specs))]
        self._check_size(fields)
        return stored.pack(self.schema.record, fields)

    def _absorb(self, payload: bytes | None, made: bool) -> None:
        """By the owner: the copy becomes that; None: nothing was committed."""
        fields = self._fields_of(payload)
        changed = {}
        for index, spec in enumerate(self.schema.specs):
            raw, live = fields.get(spec.name), self._live(index)
            if raw is None:
                raw = spec.encode(spec.default())
            if live is None or live[1] != raw:
                changed[index] = raw
        if changed:
            super()._put_down(changed, made)

    def _fields_of(self, payload: bytes | None) -> dict[str, bytes]:
        """Raises: IncompatibleError: if this class has other fields, or it is no state at all."""
        if payload is None:
            return {}
        try:
            texts, fields = stored.unpack(payload)
        except UNDECODABLE as error:
            raise self._damaged(error) from error
        self._check_fields(texts)
        return fields

    def _read(self, index: int) -> Any:
        """The same value as long as the state is the same."""
        lock: Any = self.lock()
        if lock is None or lock._mine() or lock.flags & native.REMOVED:
            return super()._read(index)
        found = lock.away.load()
        known, fields = self.outside
        if known != found.known:
            fields = self._fields_of(found.payload)
            self.outside = found.known, fields
        raw = fields.get(self.schema.names[index])
        shown = self.shown.get(index)
        if shown is None or shown[0] != raw:
            shown = raw, self._shown(index, None if raw is None else (0, raw))
            if not self.schema.specs[index].shape.copied:
                self.shown[index] = shown
        return shown[1]

    def _committed(self, indices: Sequence[int]) -> tuple[View, int, list[tuple[int, bytes] | None]]:
        lock: Any = self.lock()
        if lock is None or lock._mine():
            return super()._committed(indices)
        fields = self._fields_of(lock.away.load().payload)
        found = [fields.get(self.schema.names[index]) for index in indices]
        return self, 0, [None if raw is None else (0, raw) for raw in found]


class FarPlainView(FarView, PlainView):
    """Beside a lock of files."""

    def _current_value(self, index: int) -> Any:
        return self._read(index)


if not native.missing:

    class FarNativeView(FarView, NativeView):
        """Beside a native mutex."""


def view_of(lock: Handle, schema: Schema, siblings: list[View]) -> View:
    """A new one."""
    if not native.missing and isinstance(lock, native.Mutex):
        return (FarNativeView if lock.far else NativeView)(lock, schema, siblings)
    return (FarPlainView if lock.far else PlainView)(lock, schema, siblings)
