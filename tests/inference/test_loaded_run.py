"""Opening a run: the weights of the given step, every RLG weight, and the limits of a plain model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from difrl.data.jsonl import DataFileError
from difrl.data.prompts import Prompt
from difrl.inference.loaded_run import LoadedRun, open_run, with_images
from difrl.inference.merge import merge
from difrl.policies.base import GuidanceSettings
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.reporting.inference_defaults import InferenceDefaults
from difrl.reporting.metrics_file import read_metrics
from difrl.reporting.terminal import SilentDisplay
from difrl.runtime.distributed import DistributedContext
from difrl.training import checkpoint
from difrl.training import run as running
from difrl.training.checkpoint import CheckpointError
from difrl.training.evaluation import Evaluator
from difrl.training.inputs import load_inputs
from samplers import keyed
from tests.recipes import recipe

TEXTS = ["a red circle", "two blue squares"]
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"model": {"train": "lora", "lora": {"rank": 2}}}}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of three steps, with a learning rate large enough to change the images."""
    folder = tmp_path_factory.mktemp("runs") / str(request.param)
    config = recipe(
        sd3,
        folder,
        **KINDS[request.param],
        data={"prompts_per_step": 2, "group_size": 2},
        train={"lr": 3e-2},
        eval={"every": 0},
    )
    running.train(config, display=SilentDisplay())
    return folder


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(checkpoint.checkpoint_folder(run, step) / "trained.safetensors")


def images(opened: LoadedRun, **options: Any) -> Tensor:
    drawn = opened.sample(TEXTS, per_prompt=2, **options).images
    assert drawn is not None
    return drawn


def test_the_newest_checkpoint_is_opened(run: Path) -> None:
    """Its weights are those at the end of the run."""
    opened = open_run(run, device="cpu")
    assert opened.step == 3
    exact = weights(run, 3)
    assert all(torch.equal(p, exact[name]) for name, p in opened.policy.parameters.items())


def test_rlg_0_is_the_pretrained_model_and_1_the_trained_one(run: Path, sd3: Path) -> None:
    """Weight 0.5 changes the images less than 1 does, and 2 changes them more."""
    opened, plain = open_run(run, device="cpu"), open_run(sd3, device="cpu", steps=4)
    at = {w: images(opened, rlg=w) for w in (0.0, 0.5, 1.0, 2.0)}
    torch.testing.assert_close(at[0.0], images(plain), rtol=0, atol=1e-6)
    assert torch.equal(at[1.0], images(opened))
    moved = {w: float((at[w] - at[0.0]).square().mean()) for w in at}
    assert 0 < moved[0.5] < moved[1.0] < moved[2.0]


def drawn_by_diffusers(model: Path, adapter: Path | None = None) -> Tensor:
    """Return the images of from_pretrained and load_lora_weights for the prompts and noise of `images`."""
    # Pass None for the absent T5, and 0 tokens, or diffusers pads prompts as if it were there.
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    drawn: Tensor = pipeline(
        [text for text in TEXTS for _ in range(2)],
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=0,
        latents=keyed((4, 4, 4), seed=0, step=0, samples=torch.arange(4), use="sample/init"),
        output_type="pt",
    ).images
    return drawn


def test_plain_diffusers_draws_the_same_images_from_what_the_run_saved(run: Path, sd3: Path, tmp_path: Path) -> None:
    """The merged model loads with from_pretrained, an adapter with load_lora_weights; same noise, same image to 1e-4."""
    expected = images(open_run(run, device="cpu"))
    assert not torch.allclose(expected, drawn_by_diffusers(sd3), atol=1e-3)
    merge(str(run), tmp_path / "whole")
    torch.testing.assert_close(drawn_by_diffusers(tmp_path / "whole"), expected, rtol=0, atol=1e-4)
    if run.name == "lora":
        torch.testing.assert_close(drawn_by_diffusers(sd3, run / "model"), expected, rtol=0, atol=1e-4)


def test_an_older_checkpoint_is_opened_by_its_step(run: Path) -> None:
    older = open_run(run, device="cpu", step=2)
    assert older.step == 2
    exact = weights(run, 2)
    assert all(torch.equal(p, exact[name]) for name, p in older.policy.parameters.items())
    with pytest.raises(CheckpointError, match=r"no checkpoint .*step-000001; the run has step-000002, step-000003"):
        open_run(run, device="cpu", step=1)


def test_the_seed_decides_the_noise(run: Path) -> None:
    opened = open_run(run, device="cpu")
    assert torch.equal(images(opened, seed=4), images(opened, seed=4))
    assert not torch.allclose(images(opened, seed=4), images(opened, seed=5))
    # A prompt with what belongs to it may stand for its text.
    asked = [Prompt(text, {}, None, 1.0) for text in TEXTS]
    again = opened.sample(asked, per_prompt=2, seed=4)
    assert torch.equal(again.images, images(opened, seed=4))  # type: ignore[arg-type]
    assert again.prompt_texts == [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1]]


def test_steps_and_guidance_may_be_others_than_the_runs(run: Path) -> None:
    opened = open_run(run, device="cpu", steps=2, guidance=3.0)
    assert opened.config.eval.steps == 2
    before = opened.policy.evaluations
    images(opened)
    assert opened.policy.evaluations - before == 4 * 2 * 2  # samples, steps, with and without the prompt


def test_a_plain_model_has_no_rlg(sd3: Path) -> None:
    """Only weight 1 is possible, since there is no other model to blend with."""
    plain = open_run(sd3, device="cpu", steps=2)
    assert plain.step == 0
    assert images(plain).shape == (4, 3, 8, 8)
    for weight in (0.0, 2.0):
        with pytest.raises(ModelError, match=rf"RLG at weight {weight:g} .* is a plain model; give a run folder"):
            plain.sample(TEXTS, rlg=weight)


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_run_is_sampled_at_its_own_default(run: Path, tmp_path: Path) -> None:
    """The settings of inference.json are used unless a call gives others."""
    other = copied(run, tmp_path)
    InferenceDefaults(2.0).write(other)
    opened, plain = open_run(other, device="cpu"), open_run(run, device="cpu")
    assert opened.guidance == GuidanceSettings(2.0)
    assert torch.equal(images(opened), images(plain, rlg=2.0))
    assert torch.equal(images(opened, rlg=1.0), images(plain))
    assert opened.with_guidance(3, None).guidance_at(0.5) == GuidanceSettings(0.5, first_steps=3)
    assert opened.with_guidance(None, 0.9).guidance_at(None) == GuidanceSettings(2.0, adaptive=0.9)


def test_a_run_that_has_saved_nothing_yet_says_so(run: Path, tmp_path: Path) -> None:
    young = copied(run, tmp_path)
    shutil.rmtree(young / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has no checkpoint yet; let the run reach checkpoint\.every"):
        open_run(young, device="cpu")


@pytest.mark.parametrize("name", ["trained.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_noticed(run: Path, tmp_path: Path, name: str) -> None:
    damaged = copied(run, tmp_path)
    place = checkpoint.find_latest(damaged)
    assert place is not None
    (place / name).write_bytes((place / name).read_bytes()[:20])
    with pytest.raises(CheckpointError, match=rf"step-000003 is damaged: {name}.*--resume passes it over"):
        open_run(damaged, device="cpu")


def test_a_path_that_is_nothing_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        open_run(tmp_path / "nothing", device="cpu")


AVERAGE: dict[str, Any] = {
    "snapshots": {"average": {"kind": "average", "decay": 0.9}},
    "eval": {"every": 3, "images": 6, "snapshot": "average", "show": 0, "rlg": []},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_is_evaluated_saved_and_opened(kind: str, sd3: Path, tmp_path: Path) -> None:
    """One set of weights everywhere, and θ goes on without it: the run ends with the weights of a run without an average."""
    size = {"data": {"prompts_per_step": 2, "group_size": 2}, "train": {"lr": 3e-2}, **KINDS[kind]}
    config = recipe(sd3, tmp_path / "averaged", **size, **AVERAGE)
    running.train(config, display=SilentDisplay())
    running.train(recipe(sd3, tmp_path / "plain", **size, eval={"every": 0}), display=SilentDisplay())
    saved = load_file(checkpoint.checkpoint_folder(tmp_path / "averaged", 3) / "snapshots.safetensors")
    theta = weights(tmp_path / "averaged", 3)
    assert all(torch.equal(value, theta[name]) for name, value in weights(tmp_path / "plain", 3).items())
    assert any(not torch.equal(saved[f"average/{name}"], value) for name, value in theta.items())

    opened = open_run(tmp_path / "averaged", device="cpu")
    assert all(torch.equal(p, saved[f"average/{name}"]) for name, p in opened.policy.parameters.items())
    inputs = load_inputs(config, 1)
    evaluator = Evaluator(opened.policy, inputs.scorer, inputs.evaluation, DistributedContext(), config.seed)
    last = read_metrics(tmp_path / "averaged")[-1]
    assert evaluator(6)["eval/reward/mean"] == pytest.approx(last["eval/reward/mean"], rel=1e-6)

    merge(str(tmp_path / "averaged"), tmp_path / "whole")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole", text_encoder_3=None, tokenizer_3=None)
    assert isinstance(opened.policy, DiffusionPolicy)
    condition = opened.policy.prompts([Prompt(text, {}) for text in TEXTS], False).tensors
    embeds, pooled = condition["prompt_embeds"], condition["pooled_prompt_embeds"]
    given = (torch.ones(2, 4, 4, 4), embeds, pooled, torch.full((2,), 500.0))
    torch.testing.assert_close(
        pipeline.transformer(*given).sample,
        opened.policy.module(*given).sample,
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_snapshot_that_the_recipe_does_not_have_is_refused(sd3: Path) -> None:
    for name in ("ema", "base"):
        with pytest.raises(
            ValueError, match=rf"eval\.snapshot: '{name}' is not a snapshot; expected current or average"
        ):
            recipe(sd3, **{**AVERAGE, "eval": {"snapshot": name}})


def test_input_images_for_prompts(tmp_path: Path) -> None:
    """One image for all prompts, all images for one prompt, or one each; other numbers are refused."""
    for name in ("1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    red, blue = Prompt("red", {"n": 1}), Prompt("blue", {})
    one, two = tmp_path / "1.png", tmp_path / "2.png"

    def given(prompts: list[Prompt], *images: Path | str) -> list[tuple[str, Path | None]]:
        return [(prompt.text, prompt.image) for prompt in with_images(prompts, images)]

    assert given([red, blue], one) == [("red", one), ("blue", one)]
    assert given([red], str(one), two) == [("red", one), ("red", two)]
    assert given([red, blue], one, two) == [("red", one), ("blue", two)]
    assert with_images([red], [one]) == [Prompt("red", {"n": 1}, image=one)]
    with pytest.raises(ModelError, match="3 images and 2 prompts, expected one image for all prompts, or one each"):
        given([red, blue], one, two, one)
    with pytest.raises(DataFileError, match=r"none\.png: cannot be read: No such file"):
        given([red], tmp_path / "none.png")
