"""A start of difrl is silent, whichever optional libraries are installed."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from difrl.runtime.import_messages import MESSAGES


def test_the_import_of_models_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import difrl.policies.load"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", MESSAGES)
def test_other_messages_of_these_loggers_are_shown(name: str) -> None:
    import difrl  # noqa: F401

    shown = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.msg)  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        logger.error("something else")
        logger.error(f"{MESSAGES[name]} and the rest")
    finally:
        logger.removeHandler(handler)
    assert shown == ["something else"]
