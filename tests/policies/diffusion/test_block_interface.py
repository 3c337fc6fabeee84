"""The blocks of diffusers have the interface that the generic family relies on, and a change of it is named."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import FluxModularPipeline, StableDiffusionXLModularPipeline
from diffusers.modular_pipelines.modular_pipeline import (
    MODULAR_PIPELINE_MAPPING,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.pipelines.auto_pipeline import _get_model
from packaging.requirements import Requirement

from difrl.policies.diffusion.families.block_interface import RANGE, find_changes
from difrl.policies.diffusion.load import load_family
from difrl.policies.errors import ModelError
from tests.recipes import recipe
from tests.tiny_pipelines import FAMILIES

CONFIGS: tuple[dict[str, Any], ...] = ({}, {"is_distilled": True}, {"boundary_ratio": 0.9}, {"sample_sigmas": [1.0]})
"""Keys of a model_index.json that choose between the pipelines of one entry of diffusers' table."""
PIPELINES = sorted({build(config) for build in MODULAR_PIPELINE_MAPPING.values() for config in CONFIGS})
OTHERS = {
    "Cosmos3OmniModularPipeline": "denoiser sets no noise_pred",
    "EchoModularPipeline": "missing a required argument: 'sigma'",
    "LTX25ModularPipeline": "denoiser sets no noise_pred",
    "LTX2ModularPipeline": "denoiser sets no noise_pred",
}
"""Pipelines whose loop differs from the others', with the difference. They draw sound and images, or predict x0."""


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_of_diffusers_has_the_interface(name: str) -> None:
    changes = list(find_changes(getattr(diffusers, name)()))
    if name in OTHERS:
        assert OTHERS[name] in "; ".join(changes)
    else:
        assert changes == [], f"diffusers {diffusers.__version__} has changed its blocks; mend families/modular.py"


def test_the_table_of_pipelines_is_where_the_family_looks() -> None:
    assert _get_model("FluxPipeline") == "flux"
    assert MODULAR_PIPELINE_MAPPING["flux"]({}) == "FluxModularPipeline"


def test_the_range_of_releases_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    pinned = next(Requirement(text) for text in project["dependencies"] if text.startswith("diffusers"))
    assert pinned == Requirement(RANGE)
    assert pinned.specifier.contains(diffusers.__version__)


def denoiser_class(pipeline: type[Any] = FluxModularPipeline) -> type[Any]:
    loop = pipeline().blocks.get_execution_blocks(prompt="").sub_blocks["denoise.denoise"]
    return type(loop.sub_blocks["denoiser"])


@contextmanager
def without(owner: type[Any], name: str) -> Iterator[None]:
    """Remove an attribute of a class during the block."""
    value = owner.__dict__[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


def replaced(owner: Callable[[], type[Any]], name: str, value: Any) -> Any:
    return patch.object(owner(), name, value)


def call_by_step(self: Any, components: Any, block_state: Any, step: int) -> None:
    block_state.noise_pred = step


def call_for_prediction(self: Any, components: Any, block_state: Any, i: int, t: Any) -> None:
    block_state.prediction = t


def set_without_kind(self: Any, key: str, value: Any) -> None:
    pass


def select_by_position(self: Any, *triggers: str) -> None:
    pass


CHANGES: dict[str, Callable[[], Any]] = {
    "get_execution_blocks(*triggers: 'str') -> 'None' is called otherwise: got an unexpected keyword argument 'prompt'": partial(
        replaced, lambda: SequentialPipelineBlocks, "get_execution_blocks", select_by_position
    ),
    "denoise.denoise has no loop_step": partial(without, LoopSequentialPipelineBlocks, "loop_step"),
    "FluxAutoBlocks has no required_inputs": lambda: _without_all("required_inputs"),
    "PipelineState.set(key: 'str', value: 'Any') -> 'None' is called otherwise: too many positional arguments": partial(
        replaced, lambda: PipelineState, "set", set_without_kind
    ),
    "denoise.denoise.denoiser.__call__ is not wrapped by torch.no_grad, under which it would be found": partial(
        replaced,
        denoiser_class,
        "__call__",
        lambda self, components, block_state, i, t: setattr(block_state, "noise_pred", t),
    ),
    "is called otherwise: missing a required argument: 'step'": partial(
        replaced, denoiser_class, "__call__", torch.no_grad()(call_by_step)
    ),
    "denoise.denoise.denoiser sets no noise_pred": partial(
        replaced, denoiser_class, "__call__", torch.no_grad()(call_for_prediction)
    ),
    "an entry of text_encoder.inputs has no kwargs_type": lambda: _without_field(),
}
"""Message -> a change of diffusers during a block."""


@contextmanager
def _without_all(name: str) -> Iterator[None]:
    with without(SequentialPipelineBlocks, name), without(ModularPipelineBlocks, name):
        yield


@contextmanager
def _without_field() -> Iterator[None]:
    step = type(FluxModularPipeline().blocks.get_execution_blocks(prompt="").sub_blocks["text_encoder"])
    bare = SimpleNamespace(name="prompt", default=None, required=True)
    with patch.object(step, "inputs", property(lambda self: [bare])):
        yield


@pytest.mark.parametrize("message", CHANGES)
def test_a_change_is_named(message: str) -> None:
    pipeline = FluxModularPipeline()
    assert list(find_changes(pipeline)) == []
    with CHANGES[message]():
        assert message in "; ".join(find_changes(pipeline))
    assert list(find_changes(pipeline)) == []


def test_a_guider_that_cannot_be_disabled_is_named() -> None:
    pipeline = StableDiffusionXLModularPipeline()
    with without(type(pipeline.guider).__mro__[1], "disable"):
        assert list(find_changes(pipeline)) == ["guider has no disable"]


def test_a_model_with_changed_blocks_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    folder = FAMILIES["flux-schnell"].build(tmp_path / "model")
    with (
        without(LoopSequentialPipelineBlocks, "loop_step"),
        pytest.raises(ModelError, match=r"^model\.path: .*denoise.denoise has no loop_step.*Expected .*diffusers>="),
    ):
        load_family(recipe(folder).model)
