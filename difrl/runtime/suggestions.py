"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: object, known: Iterable[str], form: str = "did you mean {}? ") -> str:
    """Return `form` with the known word that is nearest to `word`; "" if none is near, or if `word` is not a word."""
    near = get_close_matches(word, list(known), n=1) if isinstance(word, str) and len(word) < 200 else []
    return form.format(near[0]) if near else ""
