"""Constants that client and server share."""

from __future__ import annotations

PROTOCOL = 1
"""Version of the protocol. It increases with every incompatible change, and the client compares it with the server's."""


def is_token(text: str) -> bool:
    """Whether a text can be a token in an HTTP header: at least one character, all of them visible ASCII."""
    return bool(text) and all("!" <= character <= "~" for character in text)
