"""Cost of the generic family over the network itself: its blocks around a denoiser of a hundred million weights.

    python benchmarks/overhead.py                  minutes on one CPU thread; writes docs/benchmarks/overhead.md

Processor time of `ModularFamily.call` and of the network's own forward pass with the arguments that this call gives it, in
alternating pairs. What the call does around the network is also timed alone, with a network that returns at once.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from common import markdown
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from difrl.policies.diffusion.families.modular import LENGTH, SHAPE, ModularFamily

BATCH, SIDE, WORDS = 2, 8, 16
"""Samples of a call, tokens of an image's side, tokens of a prompt."""
PIXELS = 16 * SIDE


def build_vae() -> AutoencoderKL:
    """Return an autoencoder of 16 channels, which no call uses."""
    return AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def build_flux() -> tuple[ModularFamily, Tensor, dict[str, Tensor]]:
    """Return a FLUX.1 dev of 100 million random weights, states, and conditions: packed latents, guidance as an input."""
    transformer = FluxTransformer2DModel(
        num_layers=6,
        num_single_layers=11,
        num_attention_heads=4,
        attention_head_dim=128,
        joint_attention_dim=512,
        pooled_projection_dim=128,
        guidance_embeds=True,
    )
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), build_vae(), transformer=transformer, **nothing)
    condition = {
        "prompt_embeds": torch.randn(BATCH, WORDS, 512),
        "prompt_embeds" + SHAPE: torch.tensor([[WORDS, 512]] * BATCH),
        "pooled_prompt_embeds": torch.randn(BATCH, 128),
    }
    return (
        ModularFamily(pipeline).with_inputs({"height": PIXELS, "width": PIXELS}),
        torch.randn(BATCH, SIDE**2, 64),
        condition,
    )


def build_z_image() -> tuple[ModularFamily, Tensor, dict[str, Tensor]]:
    """Return a Z-Image of 95 million random weights, states, and conditions: lists of one prompt each."""
    transformer = ZImageTransformer2DModel(
        dim=768,
        n_layers=10,
        n_refiner_layers=1,
        n_heads=8,
        n_kv_heads=8,
        cap_feat_dim=512,
        axes_dims=[32, 32, 32],
    )
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), build_vae(), None, None, transformer)
    condition = {
        "prompt_embeds": torch.randn(BATCH, WORDS, 512),
        "prompt_embeds" + LENGTH: torch.full((BATCH,), WORDS),
    }
    return (
        ModularFamily(pipeline).with_inputs({"height": PIXELS, "width": PIXELS}),
        torch.randn(BATCH, 16, 2 * SIDE, 2 * SIDE),
        condition,
    )


BUILDS: Mapping[str, Callable[[], tuple[ModularFamily, Tensor, dict[str, Tensor]]]] = {
    "FLUX.1 dev": build_flux,
    "Z-Image": build_z_image,
}


@dataclass(frozen=True)
class Measured:
    """Processor seconds; every list [pairs]."""

    weights: int
    call: list[float]
    network: list[float]
    around: list[float]
    """Of a call with a network that returns at once."""
    prepared: list[float]
    """Of the first such call with other conditions, which runs the blocks before the loop."""

    @property
    def ratios(self) -> list[float]:
        """Call / network, pair by pair."""
        return [ours / bare for ours, bare in zip(self.call, self.network, strict=True)]


def spent(function: Callable[[], Any]) -> float:
    """Return the processor seconds of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


@torch.no_grad()
def measure(build: Callable[[], tuple[ModularFamily, Tensor, dict[str, Tensor]]], pairs: int) -> Measured:
    """Time a model in alternating pairs."""
    torch.manual_seed(0)
    family, x_t, condition = build()
    network: nn.Module = family.denoisers[family.denoiser_names[0]].eval()
    timestep = torch.full((BATCH,), 500.0)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    forward = network.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        return forward(*args, **kwargs)

    with patch.object(network, "forward", record):
        family.call(x_t, timestep, condition)
    (args, kwargs) = given[0]
    result = network(*args, **kwargs)
    found = Measured(sum(p.numel() for p in network.parameters()), [], [], [], [])

    def ours() -> None:
        found.call.append(spent(lambda: family.call(x_t, timestep, condition)))

    def bare() -> None:
        found.network.append(spent(lambda: network(*args, **kwargs)))

    for number in range(pairs):
        for run in (ours, bare) if number % 2 else (bare, ours):
            run()
    with patch.object(network, "forward", lambda *args, **kwargs: result):
        family.call(x_t, timestep, condition)
        found.around.extend(spent(lambda: family.call(x_t, timestep, condition)) for _ in range(pairs))
        found.prepared.extend(spent(lambda: family.call(x_t, timestep, {**condition})) for _ in range(pairs))
    return found


def row(name: str, one: Measured) -> list[str]:
    """Return a row of the table."""
    low, _, high = quantiles(one.ratios, n=4)
    network = median(one.network)
    parts = (f"{1e3 * median(part):.2f} ({median(part) / network:.2%})" for part in (one.around, one.prepared))
    ratio = f"{median(one.ratios):.4f} ({low:.4f} to {high:.4f})"
    return [name, f"{one.weights / 1e6:.0f}", f"{1e3 * network:,.0f}", ratio, *parts]


HEADER = (
    "model",
    "million weights",
    "network, ms",
    "call / network",
    "around the network, ms",
    "with new conditions, ms",
)


def page(found: Mapping[str, Measured], pairs: int) -> str:
    """Return docs/benchmarks/overhead.md."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"""# Cost of the generic family over the network itself

`python benchmarks/overhead.py` writes this page. {platform.machine()}, one thread, float32, {versions}; other jobs had the
rest of the machine.

`ModularFamily.call` runs the blocks of a diffusers pipeline up to the denoiser. Its processor time is compared with that of the
network's own forward pass with the same arguments, for {BATCH} samples of {SIDE**2} image tokens and {WORDS} tokens of a prompt:
medians of {pairs} alternating pairs, and the quartiles of their ratio. Pairs differ by more than the call costs, so what it does
around the network is also timed alone, with a network that returns at once: in a call with the conditions of the one before (a
rollout), and in the first call with other conditions (each micro-batch of training), which runs the blocks before the loop. The
brackets are shares of the network's time. A larger model, image or batch makes the shares smaller.

{markdown(HEADER, list(itertools.starmap(row, found.items())))}
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/overhead.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(build, options.pairs) for name, build in BUILDS.items()}
    written = page(found, options.pairs)
    options.out.write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
