"""Distance between a guided model and a reference along the guided model's samples, measured while they are drawn."""

from __future__ import annotations

from torch import Tensor

from samplers.guidance import Condition, Denoiser, PerSample, get_rows
from samplers.process import at_least_float32


class Remembering:
    """A denoiser that keeps its last output, so that a second use of the same state needs no evaluation."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self._state: Tensor | None = None
        self._output: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._state, self._output = x_t, self.denoiser(x_t, t, condition)
        return self._output

    def last_output(self, x_t: Tensor) -> Tensor | None:
        """Return the output at `x_t`, if the last call had this very tensor, else None."""
        return self._output if x_t is self._state else None


class Distance:
    """A denoiser that measures ||output - reference||^2, averaged over dimensions, at every state that it is called with.

    `remembered` is the reference inside the denoiser's own blend. Its output is used where the blend has evaluated it at
    the state; elsewhere `reference` is evaluated.
    """

    def __init__(self, denoiser: Denoiser, reference: Denoiser, remembered: Remembering) -> None:
        self.denoiser, self.reference, self.remembered = denoiser, reference, remembered
        self._sums, self._calls = PerSample(), PerSample()

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = self.denoiser(x_t, t, condition)
        reference = self.remembered.last_output(x_t)
        if reference is None:
            reference = self.reference(x_t, t, condition)
        rows = get_rows(condition)
        self._sums.add(
            rows, (at_least_float32(output) - at_least_float32(reference)).square().flatten(1).mean(1).double()
        )
        self._calls.add(rows, 1.0)
        return output

    def means(self, count: int) -> Tensor:
        """Return the mean over each sample's states, [count] float64 for samples 0 .. count-1."""
        return self._sums.sums(count) / self._calls.sums(count)
