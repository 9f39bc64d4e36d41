"""The tests that need more than the ordinary environment has.  What holds for each test is in coheld.testing.plugin."""

from tools import optional

collect_ignore = [] if optional.PYATS else ["with_pyats"]  # the header says so, here and below
collect_ignore += [] if optional.VALGRIND else ["with_valgrind"]


def pytest_report_header() -> list[str]:
    return [
        f"pyATS: {optional.PYATS or 'not installed: its tests and examples are not in this run, but in .ci/run pyats'}",
        f"valgrind: {optional.VALGRIND or 'not installed: its tests are not in this run, but in .ci/run analysis'}",
    ]
