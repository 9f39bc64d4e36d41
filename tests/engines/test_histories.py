"""The checker of histories: correct ones pass, each kind of mistake is caught, and on small ones it agrees with a
search of all orders. And the recorder: what a killed client has written is not lost.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st

from coheld.testing.support import procs
from engines.histories import FOREVER, INITIAL, Commit, Contradiction, Forget, History, Read, Recorder, check, load

STEP = 10  # between two moments of a made history
thorough = settings(max_examples=30, deadline=None)


# ---- correct histories ---------------------------------------------------------------------------------------


@st.composite
def correct(draw: st.DrawFn, kinds: str = "ok unknown missed lost read forget", least: int = 0) -> History:
    """Made from the moments at which things happen, in order; what is recorded of them is earlier, later and longer."""
    steps = draw(st.lists(st.sampled_from(kinds.split()), min_size=least, max_size=15))
    value, commits, reads, forgets = INITIAL, list[Commit](), list[Read](), list[Forget]()
    for number, kind in enumerate(steps, 1):
        now = number * STEP
        before, just_before, after = (
            now - draw(st.integers(5, 25)),
            now - draw(st.integers(0, 4)),
            now + draw(st.integers(0, 25)),
        )
        name, written = f"{kind}-{number}", 1000 + number
        if kind == "ok":
            commits.append(Commit(name, before, just_before, after, value, written, number, kind))
            value = written
        elif kind == "unknown":
            end = draw(st.sampled_from([FOREVER, after, just_before]))
            commits.append(Commit(name, before, just_before, end, value, written, number, kind))
            value = written
        elif kind in ("lost", "missed"):
            outcome = "lost" if kind == "lost" else "unknown"
            commits.append(Commit(name, before, after, after + 1, value, written, number, outcome))
        elif kind == "read":
            reads.append(Read(name, before, after, value))
        elif not forgets or forgets[-1].end < now:
            begin = max(before, forgets[-1].end) if forgets else before
            forgets.append(Forget(name, begin, after))
            value = INITIAL
    return History(commits, reads, forgets)


@thorough
@given(correct())
def test_correct_histories_pass(history: History) -> None:
    check(history)


def test_a_long_history_takes_little_time() -> None:
    size = 5_000
    commits = [Commit(f"c{n}", 10 * n, 10 * n + 1, 10 * n + 5, n - 1, n, n, "ok") for n in range(1, size)]
    reads = [Read(f"r{n}", 10 * n - 40, 10 * n + 40, n) for n in range(5, size)]
    begun = time.process_time()
    check(History(commits, reads))
    assert time.process_time() - begun < 5


# ---- mistakes ------------------------------------------------------------------------------------------------


def caught(what: str, commits: Sequence[Commit], reads: Sequence[Read] = (), forgets: Sequence[Forget] = ()) -> None:
    with pytest.raises(Contradiction, match=what):
        check(History(commits, reads, forgets))


many_commits = correct("ok ok ok lost missed read", least=8)
any_number = st.integers(0, 1000)


def two_in_a_row(history: History, number: int) -> tuple[Commit, Commit]:
    """Two acknowledged commits, one right after the other."""
    good = [commit for commit in history.commits if commit.outcome == "ok"]
    assume(len(good) > 1)
    number %= len(good) - 1
    return good[number], good[number + 1]


def changed(history: History, commit: Commit, **changes: Any) -> list[Commit]:
    return [replace(one, **changes) if one is commit else one for one in history.commits]


@thorough
@given(many_commits, any_number)
def test_a_lost_update(history: History, number: int) -> None:
    one, following = two_in_a_row(history, number)
    caught("an update is lost", changed(history, following, read=one.read), history.reads)


@thorough
@given(many_commits, any_number)
def test_a_token_given_twice(history: History, number: int) -> None:
    one, following = two_in_a_row(history, number)
    caught("one token", changed(history, following, token=one.token), history.reads)


@thorough
@given(many_commits, any_number)
def test_a_token_that_goes_back(history: History, number: int) -> None:
    one, following = two_in_a_row(history, number)
    swapped = {one: following.token, following: one.token}
    commits = [replace(commit, token=swapped.get(commit, commit.token)) for commit in history.commits]
    caught("gone back|do not grow", commits, history.reads)


@thorough
@given(many_commits, any_number)
def test_a_stale_read(history: History, number: int) -> None:
    one, following = two_in_a_row(history, number)
    stale = Read("stale", following.end + 1, following.end + 2, one.written)
    caught("no moment for .*read stale", history.commits, [*history.reads, stale])


@thorough
@given(many_commits, any_number)
def test_a_read_of_what_is_yet_to_come(history: History, number: int) -> None:
    one, _ = two_in_a_row(history, number)
    early = Read("early", one.begin - 2, one.intent - 1, one.written)
    caught("no moment for .*read early", history.commits, [*history.reads, early])


@thorough
@given(many_commits, any_number)
def test_a_commit_of_a_lost_holder_is_applied(history: History, number: int) -> None:
    one, _ = two_in_a_row(history, number)
    caught("a lost commit was applied", changed(history, one, outcome="lost"), history.reads)


@thorough
@given(many_commits)
def test_an_acknowledged_commit_is_missing_at_the_end(history: History) -> None:
    last, end = two_in_a_row(history, -1)[1], max(commit.end for commit in history.commits)
    missing = Read("later", end + 1, end + 2, last.read)
    caught("no moment for .*read later", history.commits, [*history.reads, missing])


@thorough
@given(many_commits, any_number)
def test_two_in_there_at_once(history: History, number: int) -> None:
    one, following = two_in_a_row(history, number)
    early = changed(history, following, begin=one.begin - 2, intent=one.intent - 1)
    caught("no moment|gone back", early, history.reads)


@thorough
@given(many_commits, any_number)
def test_a_value_from_nowhere(history: History, number: int) -> None:
    one, _ = two_in_a_row(history, number)
    caught("nobody has written", [commit for commit in history.commits if commit is not one], history.reads)


def test_a_loss_of_data_gives_no_token_back() -> None:
    one, other = Commit("1.1", 0, 1, 2, 0, 11, 5, "ok"), Commit("2.1", 20, 21, 22, 0, 12, 4, "ok")
    caught("gone back", [one, other], forgets=[Forget("0.1", 10, 11)])
    caught("an update is lost", [one, replace(other, token=6)])
    check(History([one, replace(other, token=6)], forgets=[Forget("0.1", 10, 11)]))


def test_what_was_lost_does_not_come_back() -> None:
    one, other = Commit("1.1", 0, 1, 2, 0, 11, 5, "ok"), Commit("2.1", 20, 21, 22, 11, 12, 6, "ok")
    check(History([one, other]))
    caught("no moment for loss", [one, other], forgets=[Forget("0.1", 10, 11)])
    caught("no moment for loss", [one], [Read("3.1", 12, 13, 11)], [Forget("0.1", 10, 11)])


def test_a_value_is_written_once() -> None:
    with pytest.raises(ValueError, match="not a fresh value"):
        check(History([Commit("1.1", 0, 1, 2, 0, 11, 5, "ok"), Commit("2.1", 20, 21, 22, 11, 11, 6, "ok")]))


def test_commits_in_a_circle() -> None:
    caught("each read", [Commit("1.1", 0, 1, 9, 12, 11, 5, "ok"), Commit("2.1", 0, 1, 9, 11, 12, 6, "ok")])


# ---- against a search of all orders --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Point:
    """Something that happens at one moment of this time: `kind` is read, intend, apply or forget."""

    kind: str
    earliest: float
    latest: float
    value: int = INITIAL
    commit: Commit | None = None


def points_of(history: History) -> Iterator[list[Point]]:
    """One list for each choice of the unknown commits that are applied."""
    fixed = [Point("read", read.begin, read.end, read.value) for read in history.reads]
    fixed += [Point("forget", forget.begin, forget.end) for forget in history.forgets]
    choices = [fixed]
    for commit in history.commits:
        missed = [Point("read", commit.begin, commit.intent, commit.read)]
        applied = [
            Point("intend", commit.intent, commit.intent, commit.read, commit),
            Point("apply", commit.intent, commit.end if commit.outcome == "ok" else FOREVER, commit.written, commit),
        ]
        ways = {"ok": [applied], "lost": [missed], "unknown": [applied, missed]}[commit.outcome]
        choices = [choice + way for choice in choices for way in ways]
    yield from choices


def some_order(points: Sequence[Point], now: float, value: int, token: int, inside: frozenset[Commit]) -> bool:
    """Try whatever can be next."""
    if not points:
        return True
    limit = min(point.latest for point in points)
    for point in points:
        at = max(now, point.earliest)
        if at > limit:
            continue
        rest = [one for one in points if one is not point]
        if point.kind == "read":
            found = value == point.value and some_order(rest, at, value, token, inside)
        elif point.kind == "intend":
            found = value == point.value and some_order(rest, at, value, token, inside | {point.commit})
        elif point.kind == "forget":
            found = not inside and some_order(rest, at, INITIAL, token, inside)
        else:
            mine = inside == {point.commit} and token < point.commit.token
            found = mine and some_order(rest, at, point.value, point.commit.token, frozenset())
        if found:
            return True
    return False


def possible(history: History) -> bool:
    holds = [(a, b) for a in history.commits for b in history.commits if a is not b]
    if any(a.token == b.token or (a.intent < b.begin and a.token > b.token) for a, b in holds):
        return False
    return any(some_order(points, -FOREVER, INITIAL, -1, frozenset()) for points in points_of(history))


@st.composite
def small(draw: st.DrawFn) -> History:
    """Anything, with few events; intents at different moments, so that one order of application is left."""
    size = draw(st.integers(1, 4))
    times = st.integers(0, 12)
    intents = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size, unique=True))
    tokens = sorted(intents) if draw(st.booleans()) else draw(st.permutations(sorted(intents)))
    commits = []
    for number, intent in enumerate(sorted(intents), 1):
        outcome = draw(st.sampled_from(["ok", "ok", "unknown", "lost"]))
        read = draw(st.sampled_from([number - 1, number - 1, *range(size + 1)]).filter(lambda one, n=number: one != n))
        begin, end = intent - draw(st.integers(0, 2)), intent + draw(st.integers(0, 4))
        commits.append(Commit(f"{number}", begin, intent, end, read, number, tokens[number - 1], outcome))
    reads = [
        Read(f"r{number}", begin, begin + draw(st.integers(0, 5)), draw(st.integers(0, size)))
        for number, begin in enumerate(draw(st.lists(times, max_size=3)))
    ]
    edges = sorted(draw(st.lists(times, min_size=0, max_size=4, unique=True)))
    forgets = [Forget(f"f{one}", one, other) for one, other in zip(edges[::2], edges[1::2], strict=False)]
    return History(commits, reads, forgets)


@settings(max_examples=300, deadline=None)
@given(small())
def test_it_agrees_with_a_search_of_all_orders(history: History) -> None:
    assert passes(history) == possible(history)


def passes(history: History) -> bool:
    try:
        check(history)
    except Contradiction as contradiction:
        note(str(contradiction))
        return False
    return True


# ---- the recorder --------------------------------------------------------------------------------------------


def test_what_is_recorded_is_loaded(tmp_path: Path) -> None:
    with Recorder(tmp_path, 1) as one, Recorder(tmp_path, 0) as driver:
        operation = one.commit()
        first = operation.intend(INITIAL, token=7)
        operation.end("ok")
        one.read().saw(first)
        one.read()  # failed
        one.commit().end("lost")  # got no lock
        with driver.forgetting():
            pass
        operation = one.commit()
        operation.intend(INITIAL, token=8)
        operation.end("unknown")
    history = load(tmp_path)
    check(history)
    assert [(one.read, one.written, one.token, one.outcome) for one in history.commits] == [
        (0, first, 7, "ok"),
        (0, history.commits[1].written, 8, "unknown"),
    ]
    assert [read.value for read in history.reads] == [first] and len(history.forgets) == 1
    assert history.commits[0].begin <= history.commits[0].intent <= history.commits[0].end < history.reads[0].begin
    with pytest.raises(FileExistsError):
        Recorder(tmp_path, 1)


def killed_in_a_commit(link: procs.Link, directory: Path) -> None:
    operation = Recorder(directory, 1).commit()
    link.say(operation.intend(INITIAL, token=1))
    link.hear()


def test_a_killed_client_leaves_an_unknown_commit(tmp_path: Path) -> None:
    with procs.start(killed_in_a_commit, tmp_path) as client:
        written = client.hear()
        client.kill()
    with (tmp_path / "1.events").open("a") as file:
        file.write('{"operation": 1, "what": "e')  # the kill came in the middle of a write
    [commit] = load(tmp_path).commits
    assert (commit.written, commit.outcome, commit.end) == (written, "unknown", FOREVER)
    check(History([commit]))
    check(History([commit], [Read("2.1", commit.intent + 1, commit.intent + 2, written)]))
