"""An exhaustive search over all interleavings of a few processes: small, explicit-state, without reductions.

A model is a function from a state to its successors. States are hashable and small; the search visits each once, in
breadth-first order, so that a trace to a violation is a shortest one.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

S = TypeVar("S", bound=Hashable)


class Violation(AssertionError):
    """A reachable state breaks a rule; the message has the way to it."""


def explore(
    start: S,
    successors: Callable[[S], Iterable[tuple[str, S]]],
    check: Callable[[S, bool], str | None],
) -> int:
    """Visit every reachable state; returns how many there are.

    check(state, stuck) names what is wrong with a state, or None; stuck: it has no successor.
    Raises: Violation: with the steps that lead to the first such state.
    """
    came_from: dict[S, tuple[S, str] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        following = list(successors(state))
        if wrong := check(state, not following):
            raise Violation(f"{wrong}: {state}\n" + "\n".join(_way_to(state, came_from)))
        for step, successor in following:
            if successor not in came_from:
                came_from[successor] = (state, step)
                queue.append(successor)
    return len(came_from)


def explore_to_the_end(
    start: S,
    successors: Callable[[S], Iterable[tuple[str, S]]],
    check: Callable[[S, bool], str | None],
    ended: Callable[[S], bool],
) -> int:
    """As explore; and from every reachable state there is a way to one that has ended: nobody is stuck in a loop."""
    came_from: dict[S, tuple[S, str] | None] = {}
    before: dict[S, list[S]] = {}

    def noting(state: S) -> Iterable[tuple[str, S]]:
        following = list(successors(state))
        for step, successor in following:
            before.setdefault(successor, []).append(state)
            came_from.setdefault(successor, (state, step))
        return following

    came_from[start] = None
    count = explore(start, noting, check)
    good = {state for state in came_from if ended(state)}
    todo = list(good)
    while todo:
        for state in before.get(todo.pop(), []):
            if state not in good:
                good.add(state)
                todo.append(state)
    if len(good) < count:
        state = next(one for one in came_from if one not in good)
        raise Violation(f"somebody can never end: {state}\n" + "\n".join(_way_to(state, came_from)))
    return count


def _way_to(state: S, came_from: dict[S, tuple[S, str] | None]) -> list[str]:
    steps: list[str] = []
    while (last := came_from[state]) is not None:
        state, step = last
        steps.append(f"  {step}")
    return steps[::-1]
