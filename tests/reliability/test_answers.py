"""Answers to truths in the styles of public data sets, all through the reward `math`: right ones score 1, wrong ones 0."""

from __future__ import annotations

import re

from rewards import make, score
from tests.reliability.tally import Tally
from tests.rewards.answer_table import Entry, read_table, wrap

WRAPS = len(wrap(""))


def cases(entries: list[Entry]) -> list[tuple[str, str, int]]:
    """Return truth, answer and score of each answer, and of each truth as its own answer."""
    written = [
        (entry.truth, answer, value)
        for entry in entries
        for value, answers in ((1, entry.right), (0, entry.wrong))
        for answer in answers
    ]
    return written + [(entry.truth, entry.truth, 1) for entry in entries if not re.search(r"####|boxed", entry.truth)]


def check(tally: Tally, rows: list[tuple[str, str, int]]) -> None:
    """Score texts in one call, as training does, and count each."""
    truths, texts, values = zip(*rows, strict=True)
    found = score(make("math"), texts, [""] * len(texts), [{"answer": truth} for truth in truths])
    for truth, text, value, valid, got in zip(truths, texts, values, found.valid, found.values, strict=True):
        with tally.trial(f"{truth!r} against {text!r}"):
            assert bool(valid), "invalid"
            assert float(got) == value


def test_the_table_has_at_least_150_truths() -> None:
    entries = read_table()
    assert len(entries) >= 150
    assert len({entry.truth for entry in entries}) == len(entries)
    assert all(entry.right and entry.wrong for entry in entries)


def test_answers(tally: Tally) -> None:
    """In the short form each answer stands in one of the texts, in turn; in the long form in all of them."""
    rows = [(truth, answer, value, number) for number, (truth, answer, value) in enumerate(cases(read_table()))]
    check(
        tally,
        [
            (truth, wrap(answer)[(number + index) % WRAPS], value)
            for index in tally.trials(short=1, long=WRAPS)
            for truth, answer, value, number in rows
        ],
    )


def test_a_truth_in_dollars_is_the_same_truth(tally: Tally) -> None:
    entries = [entry for entry in read_table() if not re.search(r"\$|####|\n|boxed", entry.truth)]
    step = 1 if tally.full else 8
    check(tally, [(f"${truth}$", wrap(answer)[0], value) for truth, answer, value in cases(entries)[::step]])
