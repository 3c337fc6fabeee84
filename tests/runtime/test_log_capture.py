from __future__ import annotations

import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from difrl.runtime.log_capture import LONGEST, count_library_warnings, route_warnings


def test_warnings_of_rewards_go_to_the_display_while_a_run_lasts(capfd: pytest.CaptureFixture[str]) -> None:
    shown, log = list[str](), logging.getLogger("rewards.failures")
    with route_warnings(shown.append):
        for _ in range(2):  # every one counts: each is of another step
            log.warning("reward '%s' scored %d of %d samples", "ocr", 3, 4)
        log.info("not shown")
    assert shown == ["reward 'ocr' scored 3 of 4 samples"] * 2
    assert capfd.readouterr().err == ""
    assert logging.getLogger("rewards").handlers == []
    log.warning("after the run")
    assert len(shown) == 2


def test_warnings_of_libraries_are_shown_once_and_counted(capfd: pytest.CaptureFixture[str]) -> None:
    shown, log = list[str](), transformers_logging.get_logger("transformers.tokenization_utils_base")
    handlers = logging.getLogger("transformers").handlers
    with count_library_warnings(shown.append):
        for length in range(80, 92):
            log.warning(f"Token indices sequence length is longer than {length}:\n['a', 'b']")
        log.warning("something else")
        for step in range(3):
            warnings.warn(f"the scheduler of step {step} is deprecated", FutureWarning, stacklevel=1)
    assert shown == [
        "transformers: Token indices sequence length is longer than 80: ['a', 'b']",
        "transformers: something else",
        "FutureWarning: the scheduler of step 0 is deprecated",
        "12 times: transformers: Token indices sequence length is longer than 80: ['a', 'b']",
        "3 times: FutureWarning: the scheduler of step 0 is deprecated",
    ]
    assert capfd.readouterr().err == ""
    assert logging.getLogger("transformers").handlers is handlers


def test_a_block_in_a_block_shows_a_warning_once() -> None:
    outer, inner = list[str](), list[str]()
    with route_warnings(outer.append), count_library_warnings(outer.append):
        with route_warnings(inner.append):
            logging.getLogger("rewards").warning("a")
            warnings.warn("b", UserWarning, stacklevel=1)
        logging.getLogger("rewards").warning("c")
    assert (outer, inner) == (["UserWarning: b", "c"], ["a"])


def test_a_long_message_of_a_library_is_cut() -> None:
    shown = list[str]()
    with count_library_warnings(shown.append):
        logging.getLogger("diffusers.pipelines").warning("word " * 1000)
    assert [len(text) for text in shown] == [LONGEST]
