"""Who has leases of pools, by one who only looks: the file of a ledger's state is read, never mapped, see survey.py.

A commit stays as it is while the word of the cell names it: what was read under one word is of that commit.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from .backends import files
from .backends.survey import Resource, word_of
from .process import start_of

_STATE = re.compile(r"(name-[^~]*)~\d+\.\d+\Z")
_LEDGER = re.compile(rb"\x92\x92\xa6leases.{2,3}dict\[str, Held\(.*\x92\xa5queue.{2,3}list\[Request\(", re.DOTALL)
"""In the head of the file of a state: the schema of ledger.Ledger."""
_HEAD_SIZE = 1024
_TRIES = 8
_MOST = 1 << 24
"""Of a file that is larger no more is read, bytes."""


def with_leases(found: Iterable[Resource], directory: str) -> Iterator[Resource]:
    """The same, and those that are pools of this machine as such.  Only named ones that have a state are looked at."""
    states: dict[str, str] = {}
    with suppress(OSError):
        states = {made[1]: made[0] for entry in os.listdir(directory) if "~" in entry and (made := _STATE.match(entry))}
    for one in found:
        state = states.get(os.path.basename(one.place.rpartition(":")[0])) if one.kind == "lock" else None
        is_pool = state is not None and not one.store and _is_ledger(os.path.join(directory, state))
        yield _as_pool(one) if is_pool else one


def _is_ledger(state: str) -> bool:
    with suppress(OSError), files.open_to_look(state) as file:
        return _LEDGER.search(file.read(_HEAD_SIZE)) is not None
    return False


def _as_pool(one: Resource) -> Resource:
    living = Counter(pid for pid, start in _lessees(one) if start_of(pid) == start)
    return replace(one, kind="pool", inside=dict(living), waiters=max(one.waiters, len(one.waiting)))


def _lessees(one: Resource) -> list[tuple[int, int]]:
    """Process and its start for each lease; none where that cannot be seen now."""
    from .state.slots import UNDECODABLE  # imports msgspec, which the wrapper commands need not

    for _ in range(_TRIES):
        try:
            word = word_of(one)
            found = _under(word, one)
            if word_of(one) == word:
                return found
        except (*UNDECODABLE, OSError, OverflowError, struct.error, AttributeError, LookupError):
            continue  # overtaken, or damaged
    return []


def _under(word: int, one: Resource) -> list[tuple[int, int]]:
    import msgspec

    from .state import slots, store

    path, _, offset = one.place.rpartition(":")
    generation = store.generation_of(word)
    with files.open_to_look(store.path_of(path, int(offset), generation)) as file:
        raw = file.read(_MOST)
    head = slots.Head(*slots.HEAD.unpack_from(raw))
    if (head.inode, head.generation) != (os.stat(path).st_ino, generation):
        raise ValueError(f"{file.name} is the state of another resource")
    begin = (head.first, head.second)[word & 1]  # the slot, whose first entry is leases
    entry = slots.Entry(*slots.ENTRY.unpack_from(raw, begin))
    low, high = entry.place
    leases = msgspec.msgpack.decode(raw[low:high] if entry.length > slots.SHORT else entry.data[: entry.length])
    return [(int(lease["pid"]), int(lease["start"])) for lease in leases.values()]
