"""`difrl check` of image generators: counts worked by hand, and agreement with the real pipeline, policy and trainer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import difrl.training.cost.estimate
import difrl.training.cost.images
from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.prompts import Prompt, load_prompts
from difrl.policies.diffusion.families.modular import ModularFamily
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.pretraining.tiny_sd3 import build_pipeline
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.scoring.diversity import Diversity
from difrl.tasks import shapes
from difrl.training import run as running
from difrl.training.cost import flops as cost
from difrl.training.cost.dry_run import Evaluations, Tally, count_evaluations
from difrl.training.cost.estimate import estimate
from difrl.training.cost.images import count_image_cost
from difrl.training.cost.model_cost import ENCODING
from difrl.training.cost.table import estimate_table, format_duration_range, format_size
from difrl.training.inputs import Inputs
from difrl.training.trainer import Trainer
from tests.recipes import FLOW_GRPO, recipe

SPEED = 1e9
LORA = {"train": "lora", "lora": {"rank": 4}}
TO_BASE = {"to": "base", "coefficient": 0.1}
TO_EMA = {"to": "ema", "coefficient": 0.1}
EMA = {"ema": {"decay": 0.9}}
GUIDED = {**FLOW_GRPO["rollout"], "guidance": 4.0, "window": {"kind": "fixed", "start": 1, "size": 2}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped architecture, untrained."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    build_pipeline([p.text for p in shapes.prompts()], 0).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difrl.training.cost.estimate, "measure_matmul_speed", lambda device, dtype, threads: SPEED)


def dry_run(
    config: RunConfig, processes: int = 1, evaluated: int = 100, trained: int = 100
) -> tuple[Evaluations, Tally]:
    """Count the evaluations of a run. evaluated, trained: number of evaluation and training prompts."""
    train, evaluation = ([Prompt(f"prompt {i}", {}) for i in range(count)] for count in (trained, evaluated))
    inputs = Inputs(train, evaluation, [], Scorer.from_rewards({}, {}), Diversity(), [], {})
    dry = count_image_cost(config, load_diffusion_policy(config, "meta"), inputs).dry
    return count_evaluations(config, dry, inputs, processes), dry.tally


def evaluations(**sections: Any) -> Evaluations:
    return dry_run(recipe("tiny-sd3", **sections))[0]


def parts_of(policy: DiffusionPolicy) -> list[nn.Module]:
    return [part for part in policy.family.pipeline.components.values() if isinstance(part, nn.Module)]


# The recipe has 4 prompts x 3 samples = 12 samples, 4 steps, 3 decisions a sample, micro-batches of 7.


def test_reference_samples_are_counted_for_the_run() -> None:
    """2 of each prompt, 4 calls each: 3 steps of 4 prompts use 12 of 100, 10 of 10, and on two processes 12 again."""
    shaped = {"rewards": [{"name": "jpeg_compressibility", "shape": {"kind": "par"}}], "references": {"count": 2}}
    config = recipe("tiny-sd3", **shaped)
    found = [dry_run(config, n, 0, prompts)[0].reference_samples for n, prompts in ((1, 100), (1, 10), (2, 10))]
    assert found == [12 * 2 * 4, 10 * 2 * 4, 12 * 2 * 4]
    counts, _ = dry_run(config, 1, 0, 10)
    assert counts.step == evaluations().step
    assert dry_run(recipe("tiny-sd3"), 1, 0, 10)[0].reference_samples == 0


def test_awm_by_hand() -> None:
    counts = evaluations()
    assert counts.rollout == 12 * 4
    assert counts.gradient == 12 * 3
    assert counts.without_gradient == 0
    assert (counts.step, counts.run) == (48 + 36, 3 * 84)


def test_each_anchor_and_old_weights_evaluate_every_decision_again() -> None:
    assert evaluations(anchors=[TO_EMA], snapshots=EMA).without_gradient == 36
    assert evaluations(anchors=[TO_EMA, TO_BASE], snapshots=EMA).without_gradient == 2 * 36
    guided = {**TO_BASE, "guidance": 2.0}
    assert evaluations(anchors=[TO_EMA, guided], snapshots=EMA).without_gradient == 36 + 2 * 36


def test_an_anchor_is_evaluated_in_steps_where_it_acts_or_is_measured() -> None:
    absent = {**TO_BASE, "coefficient": 0.0}
    assert evaluations(anchors=[absent]).without_gradient == 0
    assert evaluations(anchors=[{**absent, "measure": True}]).without_gradient == 36
    assert evaluations(anchors=[{**absent, "place": "reward", "divergence": "k1"}], **FLOW_GRPO).without_gradient == 0


def test_the_first_update_check_takes_another_number_of_evaluations_than_a_micro_batch() -> None:
    """Four samples of three decisions, or all of a smaller micro-batch. Copies of one fill a batch of twice its size."""
    assert [evaluations(train={"micro_batch": size}).check for size in (6, 12, 18, 999)] == [12, 24, 36, 12]
    single = {"likelihood": {"kind": "forward", "decisions": 1}, "train": {"micro_batch": 1}}
    assert evaluations(**single).check == 2
    assert evaluations(**FLOW_GRPO).check == 0  # recorded


def test_statistics_of_split_groups_take_another_pass() -> None:
    """Seven decisions are two samples of three: under θ once more, not under the reference. Nine are a whole group."""
    sections = {
        "likelihood": {"kind": "forward", "decisions": 3, "share": ["t", "noise"]},
        "objective": {"kind": "preference"},
        "anchors": [TO_EMA],
        "snapshots": EMA,
    }
    assert evaluations(**sections).without_gradient == 36 * 2 + 36
    assert evaluations(**sections, train={"micro_batch": 9}).without_gradient == 36 * 2


def test_several_updates_divide_the_samples_and_need_old_weights() -> None:
    counts = evaluations(
        train={"updates_per_step": 2},
        snapshots={"old": {"decay": 0.0}},
        likelihood={"kind": "forward", "decisions": 3, "old": "recompute"},
    )
    assert (counts.rollout, counts.gradient, counts.without_gradient) == (48, 36, 36)


def test_flow_grpo_under_guidance_with_a_window_by_hand() -> None:
    flow = {**FLOW_GRPO, "rollout": GUIDED}
    counts = evaluations(**flow, anchors=[{**TO_BASE, "divergence": "gaussian"}])
    assert counts.rollout == 12 * 4 * 2
    assert counts.gradient == 12 * 2 * 2
    assert (
        counts.without_gradient == 12 * 2 * 2
    )  # under the guidance of the likelihood, unless the anchor says otherwise
    plain = {**TO_BASE, "divergence": "gaussian", "guidance": 1.0}
    assert evaluations(**flow, anchors=[plain]).without_gradient == 12 * 2


def test_a_window_of_all_steps_leaves_out_the_last() -> None:
    assert evaluations(**FLOW_GRPO).gradient == 12 * 3


def test_heuns_solver_calls_twice_a_step_but_the_last() -> None:
    counts = evaluations(rollout={"solver": "FlowMatchHeunDiscreteScheduler"})
    assert counts.rollout == 12 * (2 * 4 - 1)


def test_evaluation_by_hand() -> None:
    # Steps 0, 2 and 3 with 8 images each and a grid of 2 x 2, in 4 steps.
    assert evaluations().evaluation == (3 * 8 + 3 * 4) * 4
    # 16 images at the first and the last; the sweep costs 1 + 2 + 2 models of 8 images; 5 steps under guidance.
    sweeping = {"final_images": 16, "rlg": [0.0, 1.0, 2.0], "steps": 5}
    counts = evaluations(eval=sweeping, rollout={"guidance": 2.0})
    assert counts.evaluation == (2 * 16 + 8 + 3 * 4 + 5 * 8) * 5 * 2
    assert evaluations(eval={"every": 0}).evaluation == 0
    assert dry_run(recipe("tiny-sd3"), evaluated=0)[0].evaluation == 0


@pytest.mark.parametrize(
    "sections",
    [
        {"anchors": [TO_EMA, TO_BASE], "snapshots": EMA},
        {**FLOW_GRPO, "rollout": GUIDED, "model": LORA, "anchors": [TO_BASE]},
        {**FLOW_GRPO, "anchors": [{"to": "base", "guidance": 2.0, "divergence": "k1", "place": "reward"}]},
        {
            "train": {"updates_per_step": 2, "micro_batch": 2},
            "snapshots": {"old": {"decay": 0.0}},
            "likelihood": {"kind": "forward", "decisions": 3, "old": "recompute"},
        },
    ],
    ids=["awm", "flow_grpo", "kl_in_reward", "updates"],
)
def test_a_step_of_the_trainer_spends_and_keeps_what_was_estimated(sd35: Path, sections: dict[str, Any]) -> None:
    config = recipe(sd35, **sections)
    processes = DistributedContext()
    policy = load_diffusion_policy(config, processes.device)
    scorer = Scorer.build(config.rewards, config.watch, processes.device)
    trainer = Trainer(config, policy, scorer, load_prompts(config.data.train), processes)
    found, row = estimate(config), trainer.step(0)
    assert row["nfe"] == found.evaluations.step
    assert row["nfe/check"] == found.evaluations.check
    moments = [
        moment for state in trainer.optimizer.state.values() for moment in (state["exp_avg"], state["exp_avg_sq"])
    ]
    assert found.memory["AdamW's two moments"] == sum(moment.nbytes for moment in moments)
    copies = {f"snapshot {name}": copy.tensors.values() for name, copy in policy.snapshots.copies.items()}
    assert {name: found.memory[name] for name in copies} == {
        name: sum(tensor.nbytes for tensor in tensors) for name, tensors in copies.items()
    }


@pytest.mark.parametrize("model", [LORA, {"train": "full"}])
@pytest.mark.parametrize("like", ["small", "sd35"])
def test_parameters_are_those_of_the_real_pipeline(
    like: str, model: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    config = recipe(request.getfixturevalue(like), model=model)
    found, policy = estimate(config), load_diffusion_policy(config)
    every = sum(p.numel() for part in parts_of(policy) for p in part.parameters())
    assert found.model.trained == sum(p.numel() for p in policy.parameters.values())
    assert found.model.frozen == every - found.model.trained


def test_memory_by_hand(small: Path) -> None:
    found = estimate(
        recipe(small, model={"dtype": "bfloat16"}, anchors=[TO_BASE], snapshots={**EMA, "slow": {"decay": 0.99}})
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(small, text_encoder_3=None, tokenizer_3=None)
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    sizes = {name: sum(p.numel() for p in pipeline.components[name].parameters()) for name in names}
    n, table = sizes["transformer"], 64 * 128  # of position embeddings
    memory = dict(found.memory)
    working = ("encoders", "denoising a rollout batch", "decoding", "activations, rough bound")
    assert all(memory.pop(name) > 0 for name in working)
    assert memory == {
        "frozen weights, float32": 4 * sizes["vae"],
        "frozen weights, bfloat16": 2 * table,
        "trained weights, float32": 4 * n,
        "gradients": 4 * n,
        "AdamW's two moments": 8 * n,
        "trained weights cast to bfloat16": 2 * n,
        "snapshot ema": 4 * n,
        "snapshot slow": 4 * n,
        "pretrained weights, kept": 4 * n,
    }
    encoders = {"encoders": 2 * (sizes["text_encoder"] + sizes["text_encoder_2"])}
    assert found.process_memory.phases[ENCODING] == encoders


@pytest.mark.parametrize(
    ("sections", "kept"),
    [
        ({"eval": {"show": 0}}, False),
        ({"eval": {"every": 0}}, False),
        ({"eval": {"show": 0, "rlg": [0.5]}}, True),
        ({"eval": {"show": 0}, "anchors": [TO_BASE]}, True),
        ({"model": LORA, "anchors": [TO_BASE]}, False),
        ({}, True),
    ],
)
def test_pretrained_weights_are_kept_where_something_needs_them(
    sd35: Path, sections: dict[str, Any], kept: bool
) -> None:
    config = recipe(sd35, **sections)
    assert ("pretrained weights, kept" in estimate(config).memory) is kept
    if not config.anchors:
        assert running.samples_base_at_end(config) is kept


@pytest.mark.parametrize("model", [LORA, {"train": "full"}])
def test_flops_and_activations_are_those_of_the_real_model(small: Path, model: dict[str, Any]) -> None:
    config = recipe(small, model=model, train={"micro_batch": 1})
    found, family = estimate(config), load_diffusion_policy(config).family
    x_t, t = torch.randn(1, *family.latent_shape()), torch.ones(1)
    encoded = family.encode("", None, None)
    condition = {name: torch.randn_like(v) if v.is_floating_point() else v for name, v in encoded.items()}
    kept = cost.KeptStorages(p.untyped_storage() for p in [*family.denoiser.parameters(), *family.denoiser.buffers()])
    with FlopCounterMode(display=False) as flops:
        with kept:
            output = family.call(x_t, t, condition)
        forward = flops.get_total_flops()
        output.sum().backward()
    # Torch has no formula for its CPU attention, so that has to be added: 2 products of 76 x 76 tokens forward and 5
    # backward, in 4 layers of width 128; the last layer's text tokens ask and are thrown away.
    product = 4 * 2 * 76 * 76 * 128
    assert found.model.forward == forward + 2 * product
    assert found.model.training == flops.get_total_flops() + (2 + 5) * product
    # The real kernel also keeps a normaliser for each head and token, under 1 %.
    assert found.memory["activations, rough bound"] == pytest.approx(kept.bytes, rel=0.01)


def test_gradient_checkpointing_trades_a_forward_pass_for_activations(small: Path) -> None:
    plain, saving = estimate(recipe(small)), estimate(recipe(small, model={"gradient_checkpointing": True}))
    assert saving.model.training == plain.model.training + plain.model.forward
    name = "activations, rough bound"
    assert saving.memory[name] < 0.5 * plain.memory[name]


def test_evaluations_whose_activations_are_alive_at_once() -> None:
    def alive(**sections: Any) -> int:
        return dry_run(recipe("tiny-sd3", **sections))[1].together

    assert alive(train={"micro_batch": 1}) == 1
    assert alive(train={"micro_batch": 7}) == 2 * 3  # 2 samples with their 3 decisions
    assert alive(train={"micro_batch": 999}) == 12 * 3
    assert alive(**{**FLOW_GRPO, "rollout": GUIDED, "train": {"micro_batch": 2}}) == 2 * 2


def test_time_by_hand(small: Path) -> None:
    found = estimate(recipe(small, anchors=[TO_BASE]))
    flops = (48 + 36 + 12) * found.model.forward + 36 * found.model.training  # 12 for the first-update check
    low, high = found.model.efficiency
    assert found.step_seconds == pytest.approx((flops / high / SPEED, flops / low / SPEED))
    run = 3 * flops + found.evaluations.evaluation * found.model.forward
    assert found.run_seconds == pytest.approx((run / high / SPEED, run / low / SPEED))
    drawing = replace(found, evaluations=replace(found.evaluations, draws=3))
    assert drawing.step_seconds[0] == found.step_seconds[0]
    assert drawing.step_seconds[1] == pytest.approx((flops + 2 * 48 * found.model.forward) / low / SPEED)
    assert replace(found, processes=2).run_seconds[0] == pytest.approx(found.run_seconds[0] / 2)


def test_speed_is_measured_with_the_threads_of_the_run(sd35: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difrl.training.cost.estimate, "measure_matmul_speed", lambda device, dtype, threads: threads)
    before = torch.get_num_threads()
    assert estimate(recipe(sd35, train={"threads": before + 1})).speed == before + 1
    assert estimate(recipe(sd35)).speed == before
    assert cost.measure_matmul_speed(torch.device("cpu"), torch.float32, 1) > 1e6
    assert torch.get_num_threads() == before


def test_the_table_reads_well_at_80_columns(small: Path) -> None:
    config = recipe(small, anchors=[TO_EMA], snapshots=EMA, collect={"max_draws": 4})
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(estimate_table(estimate(config, 2)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("trains 2.29 M parameters", "each process", "snapshot ema", "rough estimate", "up to", "Not in it"):
        assert words in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.21, 0.63, "0.21 – 0.63 s"),
        (20, 61, "0.33 – 1 min"),
        (3000, 9000, "0.83 – 2.5 h"),
        (86400, 12345 * 86400, "1 – 12,000 days"),
    ],
)
def test_durations(low: float, high: float, text: str) -> None:
    assert format_duration_range(low, high) == text


def test_sizes() -> None:
    assert [format_size(n) for n in (0, 999, 1000, 1536, 2**30, 16.8 * 2**30)] == [
        "0 B", "999 B", "0.977 KiB", "1.5 KiB", "1 GiB", "16.8 GiB"
    ]  # fmt: skip


def test_a_folder_that_is_missing_or_without_weights(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path: no folder '.*nowhere'"):
        estimate(recipe(tmp_path / "nowhere"))
    folder = tmp_path / "incomplete"
    shutil.copytree(small, folder)
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"model\.path: .*vae holds no weights.*again"):
        estimate(recipe(folder))


@pytest.mark.parametrize("text", ['{"_class_name": "SD3Transformer2DModel", "num_layers": "four"}', "{"])
def test_a_part_with_a_broken_config(small: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(small, folder)
    (folder / "transformer" / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"^model\.path: "):
        estimate(recipe(folder))


def test_a_pipeline_folder_that_does_not_name_its_optional_parts(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(small, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert isinstance(ModularFamily.build_skeleton(str(folder), None).denoiser, nn.Module)


def test_every_broken_input_is_named_at_once(small: Path) -> None:
    config = recipe(
        small,
        data={"train": "nowhere.txt", "evaluation": "shapes:evil"},
        rewards=[{"name": "geneval"}, {"name": "genevil"}, {"name": "math"}],
        watch=[{"import": "nowhere:reward"}],
    )
    with pytest.raises(ConfigError) as caught:
        estimate(config, processes=3)
    starts = [line.split(":")[0] for line in caught.value.problems]
    assert starts == [
        "data.train",
        "data.evaluation",
        "rewards.1 (genevil)",
        "rewards.2 (math)",
        "watch.0 (reward)",
        "data.prompts_per_step",
    ]


@pytest.mark.parametrize(
    ("sections", "error", "match"),
    [
        ({"rollout": {"height": 13}}, ModelError, r"^rollout\.height: found 13 pixels"),
        ({"rollout": {"solver": "NoSuchScheduler"}}, ModelError, r"rollout\.solver"),
        ({"rollout": {"solver": "DDIMScheduler"}}, ModelError, r"^rollout\.solver: DDIM"),
        (
            {**FLOW_GRPO, "rollout": {"kernel": "flow_sde", "noise_level": 1e-6}},
            ModelError,
            "leaves no step with noise",
        ),
        ({"model": {"train": "lora", "lora": {"targets": ["attn.nothing"]}}}, ModelError, r"model\.lora\.targets"),
        ({"model": {"train": "lora", "lora": {"warm_start": "./nowhere"}}}, ModelError, r"model\.lora\.warm_start"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    small: Path, sections: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        estimate(recipe(small, **sections))


def test_copies_on_the_cpu_cost_the_device_one(small: Path) -> None:
    """The device holds the copy in use, or none if the run has no copies."""
    sections: dict[str, Any] = {"anchors": [TO_BASE], "snapshots": {**EMA, "slow": {"kind": "soup", "every": 2}}}
    found = estimate(recipe(small, model={"copies": "cpu"}, **sections))
    names = {name for name in found.memory if name.startswith(("snapshot", "pretrained", "copy"))}
    assert names == {"copy of the weights in use"}
    assert found.memory["copy of the weights in use"] == 4 * found.model.trained
    alone = estimate(recipe(small, model={"copies": "cpu", **LORA}))
    assert "copy of the weights in use" not in alone.memory


def test_counts_do_not_depend_on_the_number_of_processes() -> None:
    """Each of two processes has half of a step's samples, so fewer activations are alive at once.

    The check of the first update is made by every process.
    """
    config = recipe("tiny-sd3", anchors=[TO_EMA], snapshots=EMA, train={"micro_batch": 999})
    (one, alone), (two, shared) = (dry_run(config, n) for n in (1, 2))
    assert replace(one, check=0) == replace(two, check=0)
    assert (alone.together, shared.together) == (36, 18)


def test_moving_windows_count_with_their_mean() -> None:
    """Windows of 1, 2 and 3 steps: two decisions a sample on average."""
    growing = {**FLOW_GRPO["rollout"], "window": {"kind": "progressive", "first": 1, "over": 3}}
    counts, tally = dry_run(recipe("tiny-sd3", **{**FLOW_GRPO, "rollout": growing}))
    assert (counts.rollout, counts.gradient, tally.together) == (12 * 4, 12 * 2, 7)


def test_a_network_that_reads_values_has_no_estimate_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other errors of it are not hidden."""

    def fail(*_: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(difrl.training.cost.images, "count_denoiser_cost", fail)
    message = "Tensor.item() cannot be called on meta tensors"
    found = estimate(recipe("tiny-sd3"))
    assert not any("activations" in name for name in found.memory)
    assert any("no estimate of activations and time" in note for note in found.model.notes)
    message = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match=message):
        estimate(recipe("tiny-sd3"))
