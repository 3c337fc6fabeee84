"""A count of trials, and the cases among them that did not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Tally:
    """Number of trials of one test, and the cases that did not hold."""

    def __init__(self, *, full: bool) -> None:
        self.full = full
        self.tried = 0
        self.failures: list[str] = []

    def trials(self, *, short: int, long: int) -> range:
        """Return the indices of the trials: `short` of them in the fast suite, `long` with `make reliability`."""
        return range(long if self.full else short)

    @contextmanager
    def trial(self, case: str) -> Iterator[None]:
        """Count one trial; an exception in it is noted under the name of its case, and the next trial follows."""
        self.tried += 1
        try:
            yield
        except Exception as error:  # every failure counts, so that one does not hide the rest
            self.failures.append(f"{case}: {type(error).__name__}: {error}")
