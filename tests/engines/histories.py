"""Histories of concurrent clients of one register, and the check that they fit a register under one lock.

    recorder = Recorder(directory, client=3)         # in the client's process; a file of its own
    operation = recorder.commit()                    # about to call the locked method
    written = operation.intend(read, token)          # inside of it: what it read, and what it is about to write
    operation.end("ok")                              # or "lost", "unknown"; killed: unknown
    operation = recorder.read(); operation.saw(value)  # a read outside of the lock; one that failed says nothing
    with Recorder(directory, client=0).forgetting(): server.wipe()

    check(load(directory))                           # raises Contradiction, which names the events

Values are fresh: each is written at most once, and INITIAL by nobody. The outcome of a commit is what its client knows:

    ok       the call returned: it was applied once
    lost     LeaseLostError, or a time-out before it had the lock: it was not applied, and never will be
    unknown  BackendError, or the client was killed: it was applied once, or not at all; perhaps later, too

What is checked. There is a moment for each applied commit, and for each loss of the server's data, so that
- a commit is applied after it was intended, if it is ok before it ended, and not if it is lost;
- it read the value of the commit that was applied last before it, or INITIAL if there was none since the data was lost;
  that one had been applied when it was intended: between the two nobody else is applied, which is mutual exclusion;
- a read has the value of some moment within it; so has the read of a commit that was not applied;
- tokens grow strictly in the order of application; and, applied or not, no two holds have the same, and a hold that
  began when another had its token already has a greater one.

Why near-linear time is enough, where linearizability of a register is NP-hard in general. Each value has one writer,
and each commit names the value that it replaced. So the order is not searched, but read off: the commits applied are
the ones that are ok, and those whose value anybody has seen (one that nobody has seen can be left out: whatever comes
after it would have read its value); each must be the only one that replaced its predecessor; and the chains that this
makes, each of which begins with INITIAL, follow each other in the order of their beginnings, with losses of the data
between. What is left to find are the moments. All conditions are now of the form "not before t" or "not after t" for
one of them, or "not before the one ahead": then each as early as it can be is a solution, if there is any. Two choices
are left, and in each the first or last that is possible excludes nothing:
- which losses lie between two chains. A chain that can stand before a loss stands before it: if it stands after it in a
  solution, then nothing was applied in between, and the loss can be put off until the chain's end;
- where a read of INITIAL belongs, if there are several places. The last one whose beginning is no later than the read's
  end: the commit that ends this place comes after all that ended earlier ones. That commit is then "not before" the
  read's beginning, which may delay later losses, so that it is repeated until nothing changes.
tests/engines/test_histories.py compares this to a search of all orders.
"""

import json
import os
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

INITIAL = 0
OUTCOMES = ("ok", "lost", "unknown")
FOREVER = float("inf")

# ---- recording -----------------------------------------------------------------------------------------------


class Recorder:
    """Appends the events of one client to a file of its own, each by one write: a SIGKILL loses the last at most.

    client: a number that no other client of the history has, one that was started again included.
    """

    def __init__(self, directory: Path, client: int) -> None:
        self._client, self._numbers = client, count(1)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(directory / f"{client}.events", flags, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def commit(self) -> "Operation":
        """A call of the locked method is about to begin."""
        return self._begin("commit")

    def read(self) -> "Operation":
        """A read outside of the lock is about to begin."""
        return self._begin("read")

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """In the block the server loses its data, once."""
        operation = self._begin("forget")
        yield
        operation.write(what="forgot", at=time.monotonic_ns())

    def _begin(self, what: str) -> "Operation":
        operation = Operation(self._fd, self._client, next(self._numbers))
        operation.write(what=what, at=time.monotonic_ns())
        return operation


@dataclass
class Operation:
    """One that has begun; `Recorder` makes it."""

    fd: int
    client: int
    number: int

    def intend(self, read: int, token: int) -> int:
        """Inside of the lock, after the value was read and before one is written: a fresh value, to be written now."""
        fresh = self.client << 32 | self.number
        self.write(what="intend", at=time.monotonic_ns(), read=read, written=fresh, token=token)
        return fresh

    def end(self, outcome: str) -> None:
        """The locked call has ended; one of OUTCOMES."""
        assert outcome in OUTCOMES, outcome
        self.write(what="end", at=time.monotonic_ns(), outcome=outcome)

    def saw(self, value: int) -> None:
        """The read has ended."""
        self.write(what="saw", at=time.monotonic_ns(), value=value)

    def write(self, **event: Any) -> None:
        line = json.dumps({"operation": self.number, **event}) + "\n"
        assert os.write(self.fd, line.encode()) == len(line)


# ---- what was recorded ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Commit:
    """A call that got so far as to intend a commit; others have changed nothing, and are left out. Times in ns."""

    name: str
    begin: float
    intent: float
    end: float
    read: int
    written: int
    token: int
    outcome: str

    def __str__(self) -> str:
        call = f"[{self.begin}, intended {self.intent}, {self.end}]"
        return f"commit {self.name} of {self.written} over {self.read}, token {self.token}, {self.outcome} {call}"


@dataclass(frozen=True, eq=False)
class Read:
    """Of a value, outside of the lock, or by a commit that was not applied."""

    name: str
    begin: float
    end: float
    value: int

    def __str__(self) -> str:
        return f"read {self.name} of {self.value} [{self.begin}, {self.end}]"


@dataclass(frozen=True, eq=False)
class Forget:
    """The server's data was lost once within this time."""

    name: str
    begin: float
    end: float

    def __str__(self) -> str:
        return f"loss of data {self.name} [{self.begin}, {self.end}]"


@dataclass(frozen=True)
class History:
    commits: Sequence[Commit] = ()
    reads: Sequence[Read] = ()
    forgets: Sequence[Forget] = ()
    """One after the other, in the order of time."""


def load(directory: Path) -> History:
    """What all recorders of a directory have written."""
    operations = [one for path in sorted(directory.glob("*.events")) for one in _operations(path)]
    return History(
        [_commit(name, events) for name, events in operations if "intend" in events],
        [
            Read(name, events["read"]["at"], events["saw"]["at"], events["saw"]["value"])
            for name, events in operations
            if "saw" in events
        ],
        sorted(
            (
                Forget(name, events["forget"]["at"], events.get("forgot", {"at": FOREVER})["at"])
                for name, events in operations
                if "forget" in events
            ),
            key=lambda forget: forget.begin,
        ),
    )


def _operations(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of each operation, by what they are. A last line that is not whole was never written."""
    found: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for line in path.read_text().split("\n")[:-1]:
        event = json.loads(line)
        found[event["operation"]][event["what"]] = event
    yield from ((f"{path.stem}.{number}", events) for number, events in found.items())


def _commit(name: str, events: dict[str, Any]) -> Commit:
    intent = events["intend"]
    end = events.get("end", {"at": FOREVER, "outcome": "unknown"})
    times = events["commit"]["at"], intent["at"], end["at"]
    return Commit(name, *times, intent["read"], intent["written"], intent["token"], end["outcome"])


# ---- checking ------------------------------------------------------------------------------------------------


class Contradiction(AssertionError):
    """The history is none of a register under one lock; the events say why."""


class Bound(NamedTuple):
    """Of a moment, and the event that says so."""

    time: float
    why: object


def _time(bound: Bound) -> float:
    return bound.time


@dataclass(eq=False)
class Moment:
    """When an event happened: not before, and not after these; each with the event that says so."""

    event: Commit | Forget
    earliest: float = -FOREVER
    latest: float = FOREVER
    bounds: list[Bound] = field(default_factory=list)
    at: float = -FOREVER  # as early as can be

    def not_before(self, time: float, why: object) -> None:
        self.bounds.append(Bound(time, why))
        self.earliest = max(self.earliest, time)

    def not_after(self, time: float, why: object) -> None:
        self.bounds.append(Bound(time, why))
        self.latest = min(self.latest, time)

    def who_says(self, time: float) -> object:
        return next(bound.why for bound in self.bounds if bound.time == time)


@dataclass
class Chain:
    """Commits each of which read the value of the one before; the first read INITIAL."""

    begin: float
    """When its first commit was intended: the data before it had been lost by then."""
    moments: list[Moment]
    until: "Bound | None" = None
    """The last beginning of a read of its last value: no loss of the data comes before."""

    @property
    def head(self) -> Moment:
        return self.moments[0]

    def end(self) -> "Bound":
        """When it is over at the earliest."""
        bounds = [Bound(one.earliest, one.who_says(one.earliest)) for one in self.moments]
        return max([*bounds, self.until] if self.until else bounds, key=_time)


def check(history: History) -> None:
    """Raises: Contradiction: there is no order of what was recorded that a register under one lock allows."""
    writers = _writers(history.commits)
    applied, reads = _applied(history, writers)
    _check_tokens_of_holds(history.commits)
    chains = _chains(applied, reads)
    gaps = _place(chains, history.forgets)
    _find_moments(gaps, history.forgets, [read for read in reads if read.value == INITIAL])
    order = [moment.event for chain in gaps if chain for moment in chain.moments]
    _check_order_of_tokens([event for event in order if isinstance(event, Commit)])


def _writers(commits: Iterable[Commit]) -> dict[int, Commit]:
    writers: dict[int, Commit] = {}
    for commit in commits:
        if commit.written == INITIAL or commit.written in writers:
            raise ValueError(f"not a fresh value: {commit}; {writers.get(commit.written)}")
        writers[commit.written] = commit
    return writers


def _applied(history: History, writers: dict[int, Commit]) -> tuple[list[Commit], list[Read]]:
    """The commits that were applied; and the reads, those of the other commits among them."""
    seen: dict[int, object] = {commit.read: commit for commit in history.commits}
    seen |= {read.value: read for read in history.reads}
    for value, observer in seen.items():
        if value != INITIAL and value not in writers:
            raise Contradiction(f"a value that nobody has written: {observer}")
        if value != INITIAL and writers[value].outcome == "lost":
            raise Contradiction(f"a lost commit was applied: {writers[value]}; {observer}")
    applied, reads = [], list(history.reads)
    for commit in history.commits:
        if commit.outcome == "ok" or (commit.outcome == "unknown" and commit.written in seen):
            applied.append(commit)
        else:
            reads.append(Read(f"of {commit}", commit.begin, commit.intent, commit.read))
    return applied, reads


def _check_tokens_of_holds(commits: Sequence[Commit]) -> None:
    """Each hold has its own, and a greater one than all that were given out before it was asked for."""
    owners: dict[int, Commit] = {}
    for commit in commits:
        if commit.token in owners:
            raise Contradiction(f"two holds with one token: {owners[commit.token]}; {commit}")
        owners[commit.token] = commit
    given = sorted(commits, key=lambda commit: commit.intent)
    greatest, number = None, 0
    for commit in sorted(commits, key=lambda commit: commit.begin):
        while number < len(given) and given[number].intent < commit.begin:
            if greatest is None or given[number].token > greatest.token:
                greatest = given[number]
            number += 1
        if greatest is not None and greatest.token > commit.token:
            raise Contradiction(f"a token has gone back: {greatest}; and after it {commit}")


def _check_order_of_tokens(order: Sequence[Commit]) -> None:
    for one, following in pairwise(order):
        if one.token >= following.token:
            raise Contradiction(f"tokens do not grow: {one}; applied after it: {following}")


def _chains(applied: Sequence[Commit], reads: Sequence[Read]) -> list[Chain]:
    """All applied commits, in chains, these in the order of their beginnings; with what is known of each alone."""
    heads, followers = [], dict[int, Commit]()
    for commit in applied:
        if commit.read == INITIAL:
            heads.append(commit)
        elif commit.read in followers:
            raise Contradiction(f"an update is lost, both replaced one value: {followers[commit.read]}; {commit}")
        else:
            followers[commit.read] = commit
    readers = defaultdict[int, list[Read]](list)
    for read in reads:
        readers[read.value].append(read)
    chains = [_chain(head, followers, readers) for head in sorted(heads, key=lambda commit: commit.intent)]
    rest = {commit.name for commit in applied} - {one.event.name for chain in chains for one in chain.moments}
    if rest:
        raise Contradiction(f"commits that each read the value of the other: {', '.join(sorted(rest))}")
    return chains


def _chain(head: Commit, followers: dict[int, Commit], readers: dict[int, list[Read]]) -> Chain:
    chain = Chain(head.intent, [_moment(head)])
    commit: Commit | None = head
    while commit is not None:
        following = followers.get(commit.written)
        moment, successor = chain.moments[-1], _moment(following) if following else None
        if following:
            moment.not_after(following.intent, following)
        for read in readers[commit.written]:
            moment.not_after(read.end, read)
            if successor:
                successor.not_before(read.begin, read)
            elif chain.until is None or read.begin > chain.until.time:
                chain.until = Bound(read.begin, read)
        if successor:
            chain.moments.append(successor)
        commit = following
    return chain


def _moment(event: Commit | Forget) -> Moment:
    moment = Moment(event)
    moment.not_before(event.intent if isinstance(event, Commit) else event.begin, event)
    if isinstance(event, Forget) or event.outcome == "ok":
        moment.not_after(event.end, event)
    return moment


def _place(chains: Sequence[Chain], forgets: Sequence[Forget]) -> list[Chain | None]:
    """Which chain stands in each gap: before the first loss, between two, and after the last."""
    gaps: list[Chain | None] = []
    begin = Bound(-FOREVER, None)  # of the next gap
    for chain in chains:
        end, head = chain.end(), chain.moments[0].event
        while len(gaps) < len(forgets) and end.time > (forget := forgets[len(gaps)]).end:
            begin = max(begin, Bound(forget.begin, forget), key=_time)
            if begin.time > chain.begin:
                raise Contradiction(f"no moment for {forget}: not after {head}, as {end.why} is later than all of it")
            gaps.append(None)
        if len(gaps) > len(forgets) or begin.time > chain.begin:
            raise Contradiction(f"an update is lost: {head}; {INITIAL} was no longer there, after {begin.why}")
        begin = max(begin, Bound(end.time, chain.moments[-1].event), key=_time)
        if len(gaps) < len(forgets):
            begin = max(begin, Bound(forgets[len(gaps)].begin, forgets[len(gaps)]), key=_time)
        gaps.append(chain)
    return gaps + [None] * (len(forgets) + 1 - len(gaps))


def _find_moments(gaps: Sequence[Chain | None], forgets: Sequence[Forget], reads: Sequence[Read]) -> None:
    """Each as early as can be; Raises: Contradiction: that is too late for one."""
    begins = [_moment(forget) for forget in forgets]
    for begin, before, after in zip(begins, gaps, gaps[1:], strict=False):
        if before and before.until:
            begin.not_before(before.until.time, before.until.why)
        if after:
            begin.not_after(after.begin, after.head.event)
    moments: list[Moment] = []
    for number, gap in enumerate(gaps):
        moments += begins[number - 1 : number] if number else []
        moments += gap.moments if gap else []
    _as_early_as_can_be(moments)
    while _delay_heads(gaps, begins, reads):
        _as_early_as_can_be(moments)


def _as_early_as_can_be(moments: Sequence[Moment]) -> None:
    now, why = -FOREVER, object()
    for moment in moments:
        if moment.earliest > now:
            now, why = moment.earliest, moment.who_says(moment.earliest)
        if now > moment.latest:
            limit = moment.who_says(moment.latest)
            raise Contradiction(
                f"no moment for {moment.event}: not before {now}, by {why}; not after {moment.latest}, by {limit}"
            )
        moment.at = now


def _delay_heads(gaps: Sequence[Chain | None], begins: Sequence[Moment], reads: Iterable[Read]) -> bool:
    """A read of INITIAL belongs into the last gap that can have begun; its chain has not. True if that changes one."""
    starts, changed = [-FOREVER, *(begin.at for begin in begins)], False
    for read in reads:
        chain = gaps[bisect_right(starts, read.end) - 1]
        if chain and read.begin > chain.head.earliest:
            chain.head.not_before(read.begin, read)
            changed = True
    return changed
