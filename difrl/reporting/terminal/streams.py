"""Capabilities of the stream that output goes to."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console


class DroppedWhenClosed:
    """A text stream that drops its text once it cannot be written, as when the `head` that it is piped to has ended.

    Output must not end a run.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            return self.stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, if it can still be written."""
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Replace the file behind the stream, which would fail again when Python flushes it at the end."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def accepts_unicode(stream: object) -> bool:
    """Return whether a stream accepts Unicode. A stream in memory has no encoding and accepts everything."""
    encoding = getattr(stream, "encoding", None)
    return encoding is None or encoding.lower().replace("-", "").startswith("utf")


def is_plain(console: Console) -> bool:
    """Return whether output must be plain lines: for files, pipes, dumb terminals and terminals without UTF-8."""
    return not console.is_terminal or console.is_dumb_terminal or not accepts_unicode(console.file)
