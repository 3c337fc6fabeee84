"""Bars of the libraries, which rewards and models show while they load."""

from __future__ import annotations

import threading

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from difrl.runtime.quiet_libraries import silenced_libraries, without_bars


@pytest.mark.parametrize("quiet", [without_bars, silenced_libraries])
def test_there_are_no_bars_in_the_block_and_afterwards_there_are(quiet, capfd: pytest.CaptureFixture[str]) -> None:
    level = transformers_logging.get_verbosity()
    with quiet():
        list(transformers_logging.tqdm(range(3), desc="Loading weights"))
        assert are_progress_bars_disabled()
        with quiet():
            pass
        list(transformers_logging.tqdm(range(3), desc="Loading weights"))
    assert capfd.readouterr().err == ""
    list(transformers_logging.tqdm(range(3), desc="Loading weights", disable=False))
    assert "Loading weights" in capfd.readouterr().err
    assert not are_progress_bars_disabled()
    assert transformers_logging.get_verbosity() == level


def test_the_last_of_overlapping_threads_restores_the_settings() -> None:
    """The second thread enters within the block of the first and leaves after it."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with silenced_libraries():
            entered.set()
            assert left.wait(60)

    thread = threading.Thread(target=second)
    with silenced_libraries():
        thread.start()
        assert entered.wait(60)
    assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    left.set()
    thread.join()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
