"""Capabilities of the stream that output goes to."""

from __future__ import annotations

from rich.console import Console


def accepts_unicode(stream: object) -> bool:
    """Return whether a stream accepts Unicode. A stream in memory has no encoding and accepts everything."""
    encoding = getattr(stream, "encoding", None)
    return encoding is None or encoding.lower().replace("-", "").startswith("utf")


def is_plain(console: Console) -> bool:
    """Return whether output must be plain lines: for files, pipes, dumb terminals and terminals without UTF-8."""
    return not console.is_terminal or console.is_dumb_terminal or not accepts_unicode(console.file)
