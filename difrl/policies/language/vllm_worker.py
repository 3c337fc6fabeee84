"""Extension of vLLM's worker that receives weights. vLLM finds it by `worker_extension_cls`; it imports neither package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Receiver:
    """A mixin of vLLM's worker class, whose `model_runner` it uses."""

    model_runner: Any

    def receive_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the worker's weights. vLLM fuses and casts them as it does when it loads a checkpoint."""
        self.model_runner.model.load_weights(weights)
