"""The part of the interface of diffusers' blocks that the generic family relies on, and what of it has changed.

diffusers changes its blocks between releases. A change is found when a model is loaded, and named, before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, PipelineState

from difrl.policies.errors import ModelError

RANGE = "diffusers>=0.42,<0.43"
"""Releases whose blocks have this interface, as in pyproject.toml."""
PIPELINE = ("blocks", "components", "config", "update_components")
BLOCKS = ("sub_blocks", "inputs", "required_inputs", "_workflow_map")
BLOCK = ("inputs", "intermediate_outputs", "expected_components")
LOOP = ("sub_blocks", "loop_step", "set_progress_bar_config", "inputs", "expected_components")
GUIDER = ("enable", "disable")
FIELDS = {
    "inputs": ("name", "default", "required", "kwargs_type"),
    "intermediate_outputs": ("name", "kwargs_type"),
    "expected_components": ("name",),
}
"""List of a block -> attributes of its entries."""


def check_interface(modular: Any) -> None:
    """Raise ModelError if the blocks of a modular pipeline differ from what the generic family relies on."""
    if changes := list(find_changes(modular)):
        raise ModelError(
            f"model.path: the blocks of {type(modular).__name__} in diffusers {diffusers.__version__} are not those that difrl "
            f"drives: {'; '.join(changes)}. Expected the interface of {RANGE}; if that is installed, choose another pipeline"
        )


def find_changes(modular: Any) -> Iterator[str]:
    """Yield a sentence for every part of the interface that is missing or different."""
    name = type(modular).__name__
    yield from _find_missing(name, modular, PIPELINE)
    if not hasattr(type(modular), "_execution_device"):
        yield f"{name} has no _execution_device"
    state = PipelineState()
    yield from _find_refusal("PipelineState.set", getattr(state, "set", None), "latents", 0, None)
    yield from _find_refusal("PipelineState.get", getattr(state, "get", None), "latents")
    for part, value in getattr(modular, "components", {}).items():
        if part.startswith("guider"):
            yield from _find_missing(part, value, GUIDER)
    blocks = getattr(modular, "blocks", None)
    select = getattr(blocks, "get_execution_blocks", None)
    refusals = list(_find_refusal("get_execution_blocks", select, prompt=""))
    yield from refusals
    if select is None or refusals:
        return
    yield from _find_missing(type(blocks).__name__, blocks, BLOCKS)
    for step, block in getattr(select(prompt=""), "sub_blocks", {}).items():
        yield from _find_missing(step, block, BLOCK)
        for entries, fields in FIELDS.items():
            for entry in getattr(block, entries, ()):
                yield from _find_missing(f"an entry of {step}.{entries}", entry, fields)
        yield from _find_refusal(f"{step}.__call__", type(block).__call__, block, modular, state)
        if isinstance(block, LoopSequentialPipelineBlocks):
            yield from _find_changes_of_loop(step, block, modular)


def _find_changes_of_loop(name: str, loop: Any, modular: Any) -> Iterator[str]:
    yield from _find_missing(name, loop, LOOP)
    inner = list(getattr(loop, "sub_blocks", {}).items())
    steps = [step for step, _ in inner]
    if "denoiser" not in steps:  # a loop of another kind, which is refused for that reason
        return
    for step, block in inner[: steps.index("denoiser") + 1]:
        place, call = f"{name}.{step}", type(block).__call__
        if not hasattr(call, "__wrapped__"):
            yield f"{place}.__call__ is not wrapped by torch.no_grad, under which it would be found"
        yield from _find_refusal(f"{place}.__call__", inspect.unwrap(call), block, modular, None, i=0, t=None)
    if "noise_pred" not in inspect.unwrap(type(loop.sub_blocks["denoiser"]).__call__).__code__.co_names:
        yield f"{name}.denoiser sets no noise_pred"


def _find_missing(place: str, found: Any, names: tuple[str, ...]) -> Iterator[str]:
    # Properties are looked up on the class: some of them raise an error for a pipeline without weights.
    for name in names:
        if not (hasattr(type(found), name) or hasattr(found, name)):
            yield f"{place} has no {name}"


def _find_refusal(place: str, function: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Iterator[str]:
    """Yield a sentence if the function is missing or does not take these arguments."""
    if function is None:
        yield f"{place} is missing"
        return
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        yield f"{place}{inspect.signature(function)} is called otherwise: {error}"
