"""Trials that are counted: a few in the fast suite, many with `make reliability`, which prints docs/reliability.md's table.

A test of this folder tries one kind of fault in many forms and notes which of them held::

    def test_something(tally: Tally) -> None:
        for index in tally.trials(short=20, long=10_000):
            with tally.trial(f"case {index}"):
                assert ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.reliability.tally import Tally

PROPERTY = "reliability"
SHOWN_FAILURES = 20


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """A count of trials; the test fails where it has none, or where one did not hold."""
    counted = Tally(full=request.config.getoption("full", False))
    yield counted
    record_property(PROPERTY, (counted.tried, counted.tried - len(counted.failures)))
    assert counted.tried, "no trial was counted"
    assert not counted.failures, f"{len(counted.failures)} of {counted.tried} trials did not hold:\n" + "\n".join(
        counted.failures[:SHOWN_FAILURES]
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the long form of the reliability trials, and their table")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of trials after the long form."""
    if not config.getoption("full", False):
        return
    terminalreporter.section("reliability")
    terminalreporter.write_line("| trial | tried | held |\n| --- | ---: | ---: |")
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == PROPERTY and report.when == "teardown":
                    terminalreporter.write_line(f"| `{report.nodeid}` | {value[0]} | {value[1]} |")
