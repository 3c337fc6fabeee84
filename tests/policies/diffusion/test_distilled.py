"""Recipes whose settings do not suit a distilled model: what is found, by the facts of each published family."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from difrl.inference.loaded_run import open_run
from difrl.policies.diffusion.distilled import find_warnings
from difrl.policies.diffusion.load import build_diffusion_policy, load_family
from difrl.policies.errors import ModelError
from difrl.runtime.errors import UserError
from difrl.training.cost.estimate import estimate
from tests.recipes import recipe
from tests.tiny_pipelines import FAMILIES

UNSUITED: dict[str, Any] = {
    "rollout": {"steps": 10, "guidance": 4.5, "height": 16, "width": 16},
    "likelihood": {"kind": "forward", "times": {"kind": "uniform"}},
    "anchors": [{"to": "base", "divergence": "velocity", "guidance": 3.0}],
    "model": {"max_sequence_length": 12},
}
GUIDANCE, TIMES = ["rollout.guidance", "anchors.0.guidance"], ["rollout.steps", "likelihood.times.kind"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("flux2-klein", [*GUIDANCE, *TIMES]),
        ("flux-schnell", GUIDANCE),
        pytest.param("flux-dev", GUIDANCE, marks=pytest.mark.slow),
        pytest.param("flux2-dev", GUIDANCE, marks=pytest.mark.slow),
        pytest.param("flux2-klein-base", [], marks=pytest.mark.slow),
        pytest.param("qwen-image", [], marks=pytest.mark.slow),
        pytest.param("z-image", [], marks=pytest.mark.slow),
        pytest.param("sdxl", [], marks=pytest.mark.slow),
    ],
)
def test_what_does_not_suit_a_family(name: str, keys: list[str], tmp_path: Path) -> None:
    config = recipe(FAMILIES[name].build(tmp_path / "model"), **UNSUITED)
    family = load_family(config.model)
    assert [warning.partition(":")[0] for warning in find_warnings(config, family)] == keys
    suited = {**UNSUITED, "rollout": {"steps": 4}, "likelihood": {"kind": "forward"}, "anchors": []}
    assert list(find_warnings(recipe(tmp_path / "model", **suited), family)) == []


def test_a_run_and_its_check_warn_and_a_plain_model_only_of_what_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FAMILIES["flux2-klein"].build(tmp_path / "model")
    config = recipe(folder, **{**UNSUITED, "rollout": {**UNSUITED["rollout"], "steps": 28}})
    expected = "rollout.steps: found 28, and this model was distilled to few"
    with caplog.at_level(logging.WARNING):
        build_diffusion_policy(config, load_family(config.model), "cpu")
        assert expected in caplog.text
        caplog.clear()
        estimate(config)
        assert expected in caplog.text
        caplog.clear()
        open_run(folder, device="cpu", steps=4)
        assert "distilled" not in caplog.text


def test_guidance_as_an_input_is_refused_by_a_model_that_does_not_read_it(tmp_path: Path) -> None:
    """FLUX.1 schnell has the pipeline of FLUX.1 dev, which passes it on."""
    folder = FAMILIES["flux-schnell"].build(tmp_path / "model")
    config = recipe(folder, model={"inputs": {"guidance_scale": 2.0}})
    for attempt in (lambda: build_diffusion_policy(config, load_family(config.model), "cpu"), lambda: estimate(config)):
        with pytest.raises(UserError, match=r"^model\.inputs\.guidance_scale: found 2.*takes no guidance as an input"):
            attempt()


@pytest.mark.slow
def test_a_pipeline_with_steps_of_its_own_refuses_another_number(tmp_path: Path) -> None:
    folder = FAMILIES["qwen-image-2.1"].build(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": [1.0, 0.8, 0.5]}))
    sections = {"rollout": {"height": 64, "width": 64, "steps": 3}}
    config = recipe(folder, **sections)
    policy = build_diffusion_policy(config, load_family(config.model), "cpu")
    assert policy.family.distilled
    assert policy.sampling.grid.steps == 3
    wrong = recipe(folder, **{"rollout": {**sections["rollout"], "steps": 4}})
    with pytest.raises(
        ModelError, match=r"^rollout\.steps: found 4, and QwenImage21Pipeline draws in 3 steps of its own"
    ):
        build_diffusion_policy(wrong, load_family(wrong.model), "cpu")
