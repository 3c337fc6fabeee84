"""What client and server must agree on."""

from __future__ import annotations

PROTOCOL = 1
"""Counts changes after which an old client or server would not understand the other; the client compares."""


def is_token(text: str) -> bool:
    """Whether a header can carry it: visible ASCII characters, one at least."""
    return bool(text) and all("!" <= character <= "~" for character in text)
