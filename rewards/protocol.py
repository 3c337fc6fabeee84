"""Constants that client and server share."""

from __future__ import annotations

PROTOCOL = 1
"""Version of the protocol. It increases with every incompatible change, and the client compares it with the server's."""


def is_token(text: str) -> bool:
    """Whether a text can be a token in an HTTP header: at least one character, all of them visible ASCII."""
    return bool(text) and all("!" <= character <= "~" for character in text)


def printable(text: str, most: int = 500) -> str:
    """Return the beginning of a text from the other side, with escapes for characters that a terminal would obey."""
    kept = text[:most] + ("…" if len(text) > most else "")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in kept)
