"""Padding and truncation of fast tokenizers: each call sets them, and `save_pretrained` writes those of the last call."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerFast


def remember_padding(parts: Iterable[object]) -> Callable[[], None]:
    """Return a function that gives the fast tokenizers among `parts` the padding and truncation that they have now."""
    backends = [part.backend_tokenizer for part in parts if isinstance(part, PreTrainedTokenizerFast)]
    states = [(backend, backend.padding, backend.truncation) for backend in backends]

    def restore() -> None:
        for backend, padding, truncation in states:
            if padding is None:
                backend.no_padding()
            else:
                backend.enable_padding(**padding)
            if truncation is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(**truncation)

    return restore
