"""How far a guided model moves from another along its own samples: a measurement that rides on a run."""

from __future__ import annotations

from torch import Tensor

from samplers.guidance import Condition, Denoiser, PerSample, rows_of
from samplers.process import raised


class Remembering:
    """A denoiser that keeps its last output, so that who asks about the same state again need not evaluate it."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self._state: Tensor | None = None
        self._output: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._state, self._output = x_t, self.denoiser(x_t, t, condition)
        return self._output

    def recalled(self, x_t: Tensor) -> Tensor | None:
        """The output at this very tensor, if it was the last to be asked for."""
        return self._output if x_t is self._state else None


class Distance:
    """A denoiser that measures ||output - reference||^2, averaged over dimensions, at every state it is asked for.

    `remembered` is the reference inside the denoiser's own blend, where there is one, whose output is taken if it has
    seen the state; else `reference` is evaluated.
    """

    def __init__(self, denoiser: Denoiser, reference: Denoiser, remembered: Remembering) -> None:
        self.denoiser, self.reference, self.remembered = denoiser, reference, remembered
        self._sums, self._calls = PerSample(), PerSample()

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = self.denoiser(x_t, t, condition)
        reference = self.remembered.recalled(x_t)
        if reference is None:
            reference = self.reference(x_t, t, condition)
        rows = rows_of(condition)
        self._sums.add(rows, (raised(output) - raised(reference)).square().flatten(1).mean(1).double())
        self._calls.add(rows, 1.0)
        return output

    def of(self, count: int) -> Tensor:
        """[count] float64: each sample's mean over the states at which it was evaluated."""
        return self._sums.of(count) / self._calls.of(count)
