"""The plugin of pytest, in runs of pytest of their own."""

import os
from pathlib import Path

import pytest

from coheld import Lockable, native
from coheld import pytest as plugin
from coheld.testing.support import delays

pytest_plugins = ["pytester"]

BACKENDS = ["file:"] if native.missing else ["shm:", "file:"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the outer run's plugins that a test names, and no others."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "coheld.pytest", *options, timeout=delays.LONG)


def assert_row(text: str) -> None:
    """The table names the lock, and this process that has it."""
    (row,) = [line.split() for line in text.splitlines() if line.startswith("bed-1 ")]
    assert row[1] == str(os.getpid())
    assert "resource  " in text and "holder  " in text


TESTS = """
    import pytest
    from coheld import Lockable

    class Bed(Lockable):
        @Lockable.locked(timeout=0.01)
        def work(self):
            pass

    held, a, b, c = (Bed(lock_name=name) for name in ("bed-1", "a", "b", "c"))

    def test_right():
        with a, b, c:
            pass

    def test_wrong():
        with b:
            with a:
                pass

    def test_wrong_again():
        with b, a:
            pass

    def test_wrong_and_failed():
        with c, b:
            raise KeyError

    @pytest.fixture
    def careless():
        yield
        with c, a:
            pass

    def test_with_a_fixture(careless):
        pass

    def test_not_got():
        try:
            held.work()
        except TimeoutError as error:
            raise ValueError from error

    def test_failed():
        raise LookupError
"""


def test_inversions_and_time_outs_of_locks(
    pytester: pytest.Pytester, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COHELD_BACKEND", backend)
    pytester.makepyfile(TESTS)
    with Lockable(lock_name="bed-1", lock_backend=backend):
        result = run(pytester, "-p", "no:faulthandler")
    result.assert_outcomes(passed=3, failed=4, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_with_a_fixture*",
            "*'a', 'c' are taken in orders that contradict each other*",
            "*_ test_wrong _*",
            "'a', 'b' are taken in orders that contradict each other*",
            "1. thread MainThread took 'a':",
            "*in test_right",
            "2. thread MainThread took 'b':",
            "*in test_wrong",
            "and then 'a':",
            "*in test_wrong",
            "*_ test_wrong_and_failed _*",
            "E  *KeyError",
            "*Captured lock order call*",
            "'b', 'c' are taken in orders that contradict each other*",
            "*_ test_not_got _*",
            "E  *ValueError",
            "*- coheld: who has what -*",
            "resource *",
            "bed-1 *",
            "*_ test_failed _*",
        ]
    )
    assert_row(result.stdout.str())
    assert "who has what" not in result.stderr.str()


TIMEOUTS = {
    "faulthandler": ["-o", "faulthandler_timeout={}", "-o", "faulthandler_exit_on_timeout=true"],
    "signal": ["-p", "pytest_timeout", "--timeout={}", "--timeout-method=signal"],
    "thread": ["-p", "pytest_timeout", "--timeout={}", "--timeout-method=thread"],
}


@pytest.mark.parametrize("by", TIMEOUTS)
def test_a_test_that_times_out_says_who_has_what(pytester: pytest.Pytester, by: str) -> None:
    pytester.makepyfile('from coheld import Lockable\n\ndef test_it():\n    Lockable(lock_name="bed-1").acquire()\n')
    with Lockable(lock_name="bed-1"):
        result = run(pytester, *(option.format(0.5) for option in TIMEOUTS[by]))
    assert result.ret != 0
    text = result.stderr.str()
    assert text.count("coheld: who has what") == text.count("::test_it times out") == 1
    assert_row(text)
    if by == "signal":
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*Failed: Timeout*"])


def test_without_a_time_out_nothing_is_told_and_workers_of_xdist_have_the_plugin_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import time
        from coheld import Lockable

        a, b = Lockable(lock_name="a"), Lockable(lock_name="b")

        def test_quick():
            with a, b:
                pass

        def test_wrong():
            with b, a:
                pass

        def test_slow():
            time.sleep(1)  # as long as the others, whose time-outs must have been called off
        """
    )
    pytester.makeconftest(
        "def pytest_collection_modifyitems(items):\n"
        "    import pytest\n"
        "    for item in items:\n"
        "        item.add_marker(pytest.mark.timeout(9 if 'slow' in item.name else 0.9, method='thread'))\n"
    )
    result = run(pytester, "-p", "pytest_timeout", "-p", "xdist", "-n1", "-o", "faulthandler_timeout=9")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*contradict each other*"])
    assert "coheld" not in result.stderr.str()


INNER = """
    pytest_plugins = ["pytester"]

    def test_runs_another(pytester):
        pytester.makepyfile("def test(): pass")
        pytester.runpytest_inprocess("-p", "coheld.pytest").assert_outcomes(passed=1)

    def test_wrong():
        from coheld import Lockable
        a, b = Lockable(lock_name="a"), Lockable(lock_name="b")
        with a, b:
            pass
        with b, a:
            pass
"""


def test_a_run_inside_of_another_does_not_end_its_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(INNER)
    run(pytester).assert_outcomes(passed=1, failed=1)


def test_a_timer_that_comes_after_the_end_writes_into_nobodys_file(tmp_path: Path) -> None:
    session = plugin._Session()
    session.close()
    with open(tmp_path / "other", "wb") as other:
        number = other.fileno()
        if number != session.stderr:
            os.dup2(number, session.stderr)
        try:
            session.tell("a test")
        finally:
            if number != session.stderr:
                os.close(session.stderr)
    assert (tmp_path / "other").read_bytes() == b""
    session.close()
