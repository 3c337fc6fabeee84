"""What vLLM's worker learns from difrl: to take weights. Named by `worker_extension_cls`, so it imports nothing of either."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Receiver:
    """Mixed into vLLM's worker class, whose `model_runner` it uses."""

    model_runner: Any

    def receive_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Puts these in the place of the worker's own; vLLM fuses and casts them as it does when it loads a checkpoint."""
        self.model_runner.model.load_weights(weights)
