"""Bars of the libraries, which rewards and models show while they load."""

from __future__ import annotations

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
