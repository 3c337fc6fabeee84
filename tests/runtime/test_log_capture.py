from __future__ import annotations

import logging

import pytest

from difrl.reporting.terminal import SilentDisplay
from difrl.runtime.log_capture import route_warnings


class Heard(SilentDisplay):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_warnings_of_rewards_go_to_the_display_while_a_run_lasts(capfd: pytest.CaptureFixture[str]) -> None:
    display, log = Heard(), logging.getLogger("rewards.failures")
    with route_warnings(display.message):
        log.warning("reward '%s' scored %d of %d samples", "ocr", 3, 4)
        log.info("not shown")
    assert display.messages == ["reward 'ocr' scored 3 of 4 samples"]
    assert capfd.readouterr().err == ""
    assert logging.getLogger("rewards").handlers == []
    log.warning("after the run")
    assert len(display.messages) == 1
