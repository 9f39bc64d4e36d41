"""coheld ps --stack: what those who have a resource do now."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from coheld.backends.survey import Resource
from coheld.cli import exits
from coheld.inspecting import resources
from coheld.owner import Owner
from coheld.process import command_of, printable, start_of
from coheld.stacks import Stack, Stacks, ask, holding_task


def show(name: str, as_json: Callable[[Resource], dict[str, Any]] | None) -> int:
    """Print the stacks of whoever has the resource of that name; as_json: of a resource, for programs."""
    found = [one for one in resources() if name in (one.called, one.name)]
    if not found:
        print(f"coheld: no resource named {name!r}", file=sys.stderr)
        return exits.NO_SUCH_RESOURCE
    whole = True
    for one in found:
        asked = {pid: ask(pid, start) for pid, start in _processes_of(one).items()}
        whole = whole and not any(stacks.missing for stacks in asked.values())
        stays = _still_has(one)
        if as_json is not None:
            answers = [{"pid": pid, **asdict(stacks)} for pid, stacks in asked.items()]
            print(json.dumps(as_json(one) | {"still_held": stays, "stacks": answers}))
        else:
            _print(one, asked, stays)
    return 0 if whole else exits.NOT_GOT


def _processes_of(one: Resource) -> dict[int, int | None]:
    """Number and start of each that has it, the holder first."""
    holders = {one.holder.pid: one.holder.start} if one.holder else {}
    return holders | {pid: start_of(pid) for pid in one.inside if pid not in holders}


def _still_has(before: Resource) -> bool:
    """Has the holder not given it back, since the first look?"""
    now = next((one.holder for one in resources() if one.place == before.place), None)
    return _turn(now) == _turn(before.holder)


def _turn(owner: Owner | None) -> object:
    return owner and (owner.pid, owner.start, owner.tid, owner.since)


def _print(one: Resource, asked: dict[int, Stacks], stays: bool) -> None:
    name = one.called
    if not asked:
        print(f"{name}: nobody {'of this host ' * bool(one.store)}has it")
    for pid, stacks in asked.items():
        if one.holder is not None and one.holder.pid == pid:
            print(printable(f"{name}: held by {one.holder}{'' if stays else ', until a moment ago'}"))
        else:
            print(f"{name}: process {pid} ({command_of(pid)}) has {one.inside[pid]} {one.part}s")
        if stacks.missing:
            print(f"  no stacks: {stacks.missing}")
        for line in _lines(one, stacks, one.holder if one.holder and one.holder.pid == pid else None):
            print(line)


def _lines(one: Resource, stacks: Stacks, holder: Owner | None) -> Iterator[str]:
    """The holder's first."""
    first = _holders_stack(stacks, one.place, holder) if holder else None
    if first is not None:
        yield f"{_title(first)}, which holds it:"
        yield from _frames(first)
    for stack in (*stacks.threads, *stacks.tasks):
        if stack is not first:
            yield f"{_title(stack)}:"
            yield from _frames(stack)
    if stacks.left_out:
        yield f"and {stacks.left_out} more tasks"


def _holders_stack(stacks: Stacks, place: str, holder: Owner) -> Stack | None:
    """A task's, or else that of the thread that is on record."""
    thread = next((one for one in stacks.threads if one.tid == holder.tid), None)
    return holding_task(stacks, place) or thread


def _title(stack: Stack) -> str:
    if not stack.tid:
        what = "task" if stack.name else "thread that Python has not started"
        return f"{what} {stack.name}{', running' if stack.running else ''}".rstrip()
    return f"thread {stack.name} ({stack.tid})"


def _frames(stack: Stack) -> Iterator[str]:
    for frame in stack.frames:
        yield f'  File "{frame.file}", line {frame.line}, in {frame.function}'
        if frame.code:
            yield f"    {frame.code}"
