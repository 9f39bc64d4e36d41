"""Deadlocks: cycles of waits without a time-out, over threads, tasks and processes of this user.

Who waits says so in its process's table (waiters.py), and each cell names its owner.  Who has waited for 200 ms, and
every second from then on, follows the chain: the cell that it waits for, its owner, the cell that this waits for, and
so on, until somebody does not wait, or it comes back to itself.  The youngest wait of a cycle is the one that gives up;
all its members see the same cycle, and each knows whether it is that one.

Why what is found is one.  All is read while others write it.  But a thread that is in one wait from before a look to
after it (its number is the same) has neither taken nor given back a lock meanwhile; so a cell that names it as its
owner, looked at in between, is held by it, and stays so as long as it waits.  A cycle that was found is therefore read
twice more: all cells again, between two looks at all numbers.

A task that waits does not run; one whose thread waits, in a plain call that blocks the loop, does not either.  So both
are followed from a task that owns.

Not followed: waits with a time-out, which end; for a guard, whose end anybody can bring about; for any of several (a
permit, a lease); for readers, who are known by process only.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import DeadlockError, Member
from ..owner import Owner
from ..process import command_of
from . import files, survey, waiters
from .waiters import Cell, Wait

if TYPE_CHECKING:
    from .base import Handle

_MOST = 1000
"""No chain is followed for longer."""
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TESTS = os.path.join(_PACKAGE, "testing") + os.sep
_MOMENT = 0.02
_TICK = 20_000_000
"""By how much an owner may seem to have begun too late: its clock is a coarse one; ns."""


def search(lock: Handle) -> None:
    """By a thread whose wait for the lock is in the table.  Raises: DeadlockError: if it is the one to give up."""
    place = waiters.of_this_thread()
    if place is not None and (cycle := _cycle_of(place)) is not None:
        raise _error(lock, cycle, _stack_of_thread())


def search_for_task(lock: Handle, place: waiters.Place, task: Any) -> None:
    """The same in the loop of a task that waits for it."""
    if (cycle := _cycle_of(place)) is not None:
        raise _error(lock, cycle, _stack_of(task))


def _cycle_of(place: waiters.Place) -> list[Wait] | None:
    """The cycle of waits that the one there is in, and first of, if it is the one to give up."""
    directory, mine = files.lock_directory(), place.wait()
    if mine is None or not any(_is_of(mine, owner) for owner in _ahead(directory, mine.cell)):
        return None
    cycle = cycle_of(directory, mine)
    return cycle if cycle is not None and _victim(cycle) == mine else None


def cycle_of(directory: str, mine: Wait) -> list[Wait] | None:
    """The cycle of waits that this one is in, and first of."""
    seen: dict[Cell, Owner] = {}
    cycle = _chain(directory, mine, [mine], seen)
    return cycle if cycle is not None and _stands(directory, cycle, seen) else None


_looks: dict[Cell, tuple[float, list[Owner]]] = {}


def _ahead(directory: str, cell: Cell) -> list[Owner]:
    """All owners that who waits for the cell waits for, behind one another.  A look serves all of this process who wait
    for the cell, for a moment that is short beside the time after which they look: whoever closed a cycle had done so
    before that."""
    now = monotonic()
    if cell not in _looks or now - _looks[cell][0] > _MOMENT:
        for old in [key for key, (when, _) in list(_looks.items()) if now - when > _MOMENT]:
            _looks.pop(old, None)
        _looks[cell] = now, _owners_ahead(directory, cell)
    return _looks[cell][1]


def _owners_ahead(directory: str, cell: Cell) -> list[Owner]:
    found: list[Owner] = []
    cells, seen = [cell], set()
    while cells and len(found) < _MOST:
        cell = cells.pop()
        if cell not in seen and (owner := _owner_of(directory, cell)) is not None:
            found.append(owner)
            cells.extend(wait.cell for wait in _waits_of(directory, owner))
        seen.add(cell)
    return found


def _chain(directory: str, mine: Wait, chain: list[Wait], seen: dict[Cell, Owner]) -> list[Wait] | None:
    """From the last of the chain on, back to its first."""
    last = chain[-1]
    owner = _owner_of(directory, last.cell)
    if owner is None or len(chain) > _MOST:
        return None
    seen[last.cell] = owner
    if _is_of(mine, owner):
        return chain
    for wait in _waits_of(directory, owner):
        if wait not in chain and (cycle := _chain(directory, mine, [*chain, wait], seen)) is not None:
            return cycle
    return None


def _waits_of(directory: str, owner: Owner) -> Iterator[Wait]:
    for wait in waiters.waits_of(directory, owner.pid, owner.start, owner.tid, owner.task_id):
        if _is_of(wait, owner) and wait.kind & ~waiters.KEEPS == waiters.FOR_LOCK:
            yield wait


def _is_of(wait: Wait, owner: Owner) -> bool:
    """Can that owner not go on while this wait lasts?"""
    same = wait.task == owner.task_id if wait.task else wait.tid == owner.tid
    return (wait.pid, wait.start) == (owner.pid, owner.start) and same and wait.since + _TICK > owner.since * 1e9


def _victim(cycle: list[Wait]) -> Wait | None:
    """The youngest of those that can fail; None: each must have what it waits for."""
    able = [wait for wait in cycle if not wait.kind & waiters.KEEPS]
    return max(able, key=lambda wait: (wait.since, wait.pid, wait.slot), default=None)


def _stands(directory: str, cycle: list[Wait], seen: dict[Cell, Owner]) -> bool:
    """See above."""
    return (
        all(waiters.goes_on(directory, wait) for wait in cycle)
        and all(_owner_of(directory, wait.cell) == seen[wait.cell] for wait in cycle)
        and all(waiters.goes_on(directory, wait) for wait in cycle)
    )


def _owner_of(directory: str, cell: Cell) -> Owner | None:
    path = survey.path_of(directory, cell[0])
    found = None if path is None else survey.cell_at(path, *cell)
    return None if found is None else found.holder


def _error(lock: Handle, cycle: list[Wait], stack: list[traceback.FrameSummary]) -> DeadlockError:
    """What the one that gives up is told."""
    directory = files.lock_directory()
    members = tuple(_member(directory, wait, cycle[at - 1]) for at, wait in enumerate(cycle))
    told = "\n".join(f"  {member}" for member in members)
    error = DeadlockError(
        f"{lock.label}: this wait would never end, so it is given up; {len(members)} wait for each other:\n{told}",
        resource=lock.label,
        owner=lock.owner(),
    )
    error.cycle = members
    error.add_note("the wait that was given up:\n" + "".join(traceback.format_list(stack)).rstrip())
    return error


def _of_others(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    return [one for one in frames if one.filename.startswith(_TESTS) or not one.filename.startswith(_PACKAGE)]


def _stack_of_thread() -> list[traceback.FrameSummary]:
    """Of the calling one, without the frames of this package."""
    return _of_others(traceback.extract_stack())


def _stack_of(task: Any) -> list[traceback.FrameSummary]:
    """The same of a task that waits: where its coroutine, the one that this awaits, and so on are."""
    frames: list[traceback.FrameSummary] = []
    coroutine = task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        frames.extend(traceback.extract_stack(frame, limit=1))
        coroutine = coroutine.cr_await
    return _of_others(frames)


def _member(directory: str, wait: Wait, before: Wait) -> Member:
    """before: of whoever waits for this one."""
    held, wanted = _resource(directory, before.cell), _resource(directory, wait.cell)
    holder = held.holder if held else None
    return Member(
        pid=wait.pid,
        command=command_of(wait.pid),
        thread="" if wait.task else wait.name or str(wait.tid),
        task=wait.name if wait.task else "",
        holds=held.label if held else "",
        held_in=holder.method if holder else "",
        waits_for=wanted.label if wanted else "",
        waits_in=wait.method,
    )


def _resource(directory: str, cell: Cell) -> survey.Resource | None:
    path = survey.path_of(directory, cell[0])
    return None if path is None else survey.cell_at(path, *cell)
