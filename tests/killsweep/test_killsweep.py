"""The kill sweep: whoever is killed at whichever instruction of a locked call, the next one gets the lock.

COHELD_SWEEP=full kills at every instruction in every scene, and at a thousand others.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coheld.testing.support import delays, effort

FULL = os.environ.get("COHELD_SWEEP") == "full"
TESTS = Path(__file__).resolve().parents[1]


def sweep(rng: random.Random, *arguments: str) -> Any:
    """Run a sweep in a process of its own, and return its report, which is printed as well."""
    command = [sys.executable, "-m", "killsweep.sweep", *arguments, "--seed", str(rng.randrange(2**32))]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path}
    places = Path(os.environ["COHELD_DIR"])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    print(done.stdout)
    report = json.loads(done.stdout)
    assert done.returncode == bool(report["failures"])
    assert report["failures"] or not list(places.iterdir()), "a file is left"
    return report


def sound(report: Any) -> None:
    """Everybody got the lock, nobody overlapped, every owner that died was recovered once."""
    assert report["failures"] == []
    assert report["missed"] == []
    assert 0 < report["recovered"] < report["killed"], "some died with the lock, some without it"


@pytest.mark.hang_limit(900)
@pytest.mark.parametrize("scene", ["alone", "waiter", "newcomer"])
def test_killed_at_every_instruction_of_the_lock(scene: str, rng: random.Random) -> None:
    body = ["--body"] if FULL or scene == "alone" else []
    share = "1" if FULL or scene == "alone" else f"{1 / effort.STRIDE:g}"
    others = "1000" if FULL else str(effort.rounds(120))
    sound(sweep(rng, "--scene", scene, "--share", share, "--others", others, *body))


SAMPLED = [
    ("fresh", "Method"),  # a process finds out who it is, in the call that is killed
    ("recovering", "Method"),  # the call that recovers is killed
    ("contended", "Method"),  # the call that has to wait is killed: before, during and after its sleep
    ("contended", "TryAfter"),  # a wake that the killed one took with him is made good by the next call
    ("rival", "Method"),
    ("alone", "With"),
    ("waiter", "Try"),  # tries once, and gets it before one who has waited longer
]


@pytest.mark.hang_limit(1800)
@pytest.mark.parametrize(("scene", "subject"), SAMPLED)
def test_killed_in_other_scenes(scene: str, subject: str, rng: random.Random) -> None:
    much = (
        ["--share", "1", "--others", "1000"]
        if FULL
        else ["--share", f"{0.3 / effort.STRIDE:g}", "--others", str(effort.rounds(40))]
    )
    sound(sweep(rng, "--scene", scene, "--subject", subject, *much))


COUNTED = [  # and how many of the lock's instructions; a lease is long, most of it Python
    ("alone", "Read", 60),
    ("fresh", "Read", 60),  # its first reading call makes or finds the register, under the lock
    ("rival", "Read", 60),
    ("joined", "Read", 80),  # a writer waits for who reads
    ("contended", "Read", 60),  # waits for a writer, and has another behind it
    ("fresh", "Permit", 40),
    ("rival", "Permit", 40),
    ("joined", "Permit", 80),
    ("contended", "Permit", 60),  # in the gate, and another behind it
    ("joined", "Rent", 20),
    *[("contended", "Rent", 40)] * FULL,  # the first walk alone, through its sleeps, takes long
]


@pytest.mark.hang_limit(1800)
@pytest.mark.parametrize(("scene", "subject", "number"), COUNTED)
def test_what_is_counted_comes_back(scene: str, subject: str, number: int, rng: random.Random) -> None:
    """Reading calls, permits and leases: nobody waits for a dead process, and nothing stays with it."""
    whole = FULL and scene in ("alone", "joined") and subject in ("Read", "Permit")
    much = (
        ["--others", "1000"]
        if whole
        else ["--most", str(effort.rounds(number)), "--others", str(effort.rounds(number // 2))]
    )
    report = sweep(rng, "--scene", scene, "--subject", subject, *much)
    assert report["failures"] == []
    assert report["missed"] == []
    assert report["killed"]


@pytest.mark.hang_limit(1800)
@pytest.mark.parametrize("scene", ["alone", "rival", "joined"])
def test_a_task_that_owns_is_killed(scene: str, rng: random.Random) -> None:
    """Not where it has to wait: the thread that does so in its stead cannot be stepped as well."""
    much = (
        ["--most", "400", "--others", "400"]
        if FULL
        else ["--most", str(effort.rounds(30)), "--others", str(effort.rounds(20))]
    )
    sound(sweep(rng, "--scene", scene, "--subject", "Task", *much))


BROKEN = [
    ("joined", "NotReturned", "WAITER hangs"),
    ("alone", "NotRobust", "SUCCESSOR hangs"),
    ("waiter", "NotRobust", "WAITER hangs"),
    ("rival", "NotExclusive", "overlap"),
    ("alone", "NotRecovered", "__recover__ was not called"),
    ("alone", "NotAtOnce", "it comes and goes"),
    ("alone", "NotDead", "where the dead one did not own it"),
]


@pytest.mark.parametrize(("scene", "subject", "finding"), BROKEN)
def test_the_sweep_finds_a_broken_lock(scene: str, subject: str, finding: str, rng: random.Random) -> None:
    """An overlap needs two at once: a few more points may have to be tried until it happens."""
    few = ["--others", "20", "--share", "0", "--bound", str(delays.MEDIUM)]
    reports = (sweep(rng, "--scene", scene, "--subject", subject, *few) for _ in range(20))
    assert any(finding in failure for report in reports for failure in report["failures"])
