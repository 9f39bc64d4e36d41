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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import CoheldError, DeadlockError, Member
from ..owner import Owner
from ..process import command_of
from . import files, survey, waiters
from .waiters import Cell, Wait

if TYPE_CHECKING:
    from .base import Handle

_MOST = 1000
"""No more waits are followed at once."""
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_TESTS = os.path.join(_PACKAGE, "testing") + os.sep
_MOMENT = 0.02
"""For how long a look serves others, seconds."""
_ROUNDED = 1_000
"""By how much the time at which an owner began may be rounded up, ns.  (A coarse clock is behind, never ahead.)"""


def search(lock: Handle) -> None:
    """By a thread whose wait for the lock is in the table.  Raises: DeadlockError: if it is the one to give up."""
    place = waiters.of_this_thread()
    if place is not None and (cycle := _found(place)) is not None:
        raise _error(lock, cycle, _stack_of_thread())


def search_for_task(lock: Handle, place: waiters.Place, task: Any) -> None:
    """The same in the loop of a task that waits for it."""
    if may_be_part(lock, place) and (cycle := _found(place)) is not None:
        raise _error(lock, cycle, _stack_of(task))


def may_be_part(lock: Handle, place: waiters.Place) -> bool:
    """Does who has the lock, which is waited for there, wait himself?  In short, as thousands may ask."""
    with suppress(OSError, CoheldError):
        return bool(_look(place.cell, lock).waits)
    return False


def _found(place: waiters.Place) -> list[Wait] | None:
    """As _cycle_of; None also where nothing can be looked at: who waits goes on to do so."""
    with suppress(OSError, CoheldError):
        return _cycle_of(place)
    return None


def _cycle_of(place: waiters.Place) -> list[Wait] | None:
    """The cycle of waits that the one there is in, and first of, if it is the one to give up."""
    mine = place.wait()
    if mine is None or not _may_be_told(mine):
        return None
    cycle = cycle_of(files.directory_here(), mine)
    return cycle if cycle is not None and _victim(cycle) == mine else None


def _may_be_told(mine: Wait) -> bool:
    """By what was there a moment ago: does it come back to itself, and past nobody who gives up before it?"""
    todo, tried = [mine], {mine}
    while todo and len(tried) < _MOST:
        look = _look(todo.pop().cell)
        if look.owner is not None and _is_of(mine, look.owner):
            return True
        following = [wait for wait in look.waits if wait not in tried and (_must(wait) or _age(wait) < _age(mine))]
        tried.update(following)
        todo.extend(following)
    return False


@dataclass(frozen=True, slots=True)
class _Look:
    """Who owned a cell, and what that one waited for."""

    when: float
    owner: Owner | None
    waits: list[Wait]


_looks: dict[Cell, _Look] = {}


def _look(cell: Cell, lock: Handle | None = None) -> _Look:
    """One serves all of this process, for a moment that is short beside the time after which they look: whoever closed
    a cycle had done so before that."""
    now, look = monotonic(), _looks.get(cell)
    if look is None or now - look.when > _MOMENT:
        if len(_looks) >= _MOST:
            _looks.clear()  # others may be doing the same, and have what they look at
        directory = files.directory_here()
        owner = _owner_of(directory, cell) if lock is None else lock._owner()
        _looks[cell] = look = _Look(now, owner, [] if owner is None else _waits_of(directory, owner))
    return look


def cycle_of(directory: str, mine: Wait) -> list[Wait] | None:
    """The cycle of waits that this one is in, and first of."""
    seen: dict[Cell, Owner] = {}
    cycle = _chain(directory, mine, seen)
    return cycle if cycle is not None and _stands(directory, cycle, seen) else None


def _chain(directory: str, mine: Wait, seen: dict[Cell, Owner]) -> list[Wait] | None:
    """From this one on, depth first, back to it.  seen: the owners on the way."""
    chain, branches, tried = [mine], [_behind(directory, mine, seen)], {mine}
    while chain:
        owner = seen.get(chain[-1].cell)
        if owner is not None and _is_of(mine, owner):
            return chain
        following = next((wait for wait in branches[-1] if wait not in tried), None)
        if following is None:
            chain.pop()
            branches.pop()
        elif len(tried) < _MOST:
            tried.add(following)
            chain.append(following)
            branches.append(_behind(directory, following, seen))
        else:
            return None
    return None


def _behind(directory: str, wait: Wait, seen: dict[Cell, Owner]) -> list[Wait]:
    """What the owner of what it waits for waits for itself."""
    owner = _owner_of(directory, wait.cell)
    if owner is None:
        return []
    seen[wait.cell] = owner
    return _waits_of(directory, owner)


def _waits_of(directory: str, owner: Owner) -> list[Wait]:
    waits = waiters.waits_of(directory, owner.pid, owner.start, owner.tid, owner.task_id)
    return [wait for wait in waits if _is_of(wait, owner) and wait.kind & ~waiters.KEEPS == waiters.FOR_LOCK]


def _is_of(wait: Wait, owner: Owner) -> bool:
    """Can that owner not go on while this wait lasts?"""
    same = wait.task == owner.task_id if wait.task else wait.tid == owner.tid
    return (wait.pid, wait.start) == (owner.pid, owner.start) and same and wait.since + _ROUNDED > owner.since * 1e9


def _victim(cycle: list[Wait]) -> Wait | None:
    """The youngest of those that can fail; None: each must have what it waits for."""
    return max((wait for wait in cycle if not _must(wait)), key=_age, default=None)


def _must(wait: Wait) -> bool:
    return bool(wait.kind & waiters.KEEPS)


def _age(wait: Wait) -> tuple[int, int, int]:
    """When it began; no two have the same."""
    return wait.since, wait.pid, wait.slot


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
    directory = files.directory_here()
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
