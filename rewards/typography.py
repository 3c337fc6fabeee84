"""One code for what readers take for one character."""

from __future__ import annotations

import unicodedata

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′ʼ", "'"),
        **dict.fromkeys("“”„‟″«»", '"'),
        **dict.fromkeys("‐‑‒–—―−﹣－", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff", ""),
        "…": "...",
    }
)


def unify_typography(text: str) -> str:
    """Return a text with composed letters (NFC), straight quotes, - for all dashes, plain spaces and no invisible ones."""
    return unicodedata.normalize("NFC", text.translate(_CHARACTERS))
