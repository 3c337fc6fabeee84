"""Every shipped preset and recipe is valid, and is the method that it claims to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from difrl.config import RunConfig
from difrl.config.load import expand_preset, read_config, recipe_summary, to_yaml
from difrl.config.presets import PRESETS
from difrl.config.presets.images import IMAGE_PRESETS
from difrl.runtime import paths
from rewards import available
from tests.recipes import NAMED

RECIPES = sorted(paths.recipes_folder().glob("*.yaml"))
TEXT_RECIPES = sorted(paths.recipes_folder().glob("text/*.yaml"))
TASK = {"model": {"path": "tiny-sd3"}, "data": {"train": "shapes:train"}, "rewards": [{"name": "geneval"}]}
METHODS = {
    "awm": "forward clipped base+ema global",
    "ddpo": "reverse clipped none group",
    "flow_grpo": "reverse clipped base group",
    "flow_grpo_fast": "reverse clipped none global",
    "dance_grpo": "reverse clipped none group",
    "cps": "reverse clipped none global",
    "grpo_guard": "reverse ratio_normalised none group",
    "flow_dppo": "reverse divergence_masked none global",
    "mix_grpo": "reverse clipped none group",
    "precise": "reverse clipped none group",
    "crd": "forward centred base-cfg4.5 global",
    "nft": "forward negative_aware base global",
    "diffusion_dpo": "forward preference none none",
    "b2_diffurl": "reverse clipped none group",
    "ddim_inpo": "forward preference none none",
    "grpo": "tokens clipped base group",
    "dr_grpo": "tokens clipped none none",
    "dapo": "tokens clipped none group",
    "rloo": "tokens clipped base none",
    "bnpo": "tokens clipped none beta",
    "gspo": "tokens clipped none group",
    "crd_text": "tokens centred base global",
    "grpo_guard_text": "tokens ratio_normalised none group",
    "clip_cov": "tokens clip_cov none group",
    "kl_cov": "tokens kl_cov none group",
    "nsr": "tokens clipped none none",
    "w_reinforce": "tokens clipped none none",
    "dpo": "tokens preference none none",
    "f_dpo": "tokens preference none none",
    "rdpo": "tokens preference none none",
    "ipo": "tokens preference none none",
    "adpo": "tokens anchored_preference none none",
    "g_opd": "tokens clipped teacher+base none",
    "vopd": "tokens clipped teacher none",
    "dph_rl": "tokens clipped base-rehearsal group",
}
"""Preset -> kind of likelihood, kind of objective, anchors, and standard deviation of advantages, as published."""


@pytest.mark.parametrize("name", PRESETS)
def test_preset_expands_to_a_valid_run(name: str) -> None:
    run = RunConfig.model_validate(expand_preset({"algorithm": name, **TASK, **NAMED.get(name, {})}))
    likelihood, objective, anchors, std = METHODS[name].split()
    assert (run.likelihood.kind, run.objective.kind, run.advantage.std) == (likelihood, objective, std)
    assert {anchor.label for anchor in run.anchors} == set(anchors.split("+")) - {"none"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_keeps_its_settings_when_its_preset_changes(name: str, tmp_path: Path) -> None:
    """A run folder has every key. Here it is of a time when the preset had no snapshots and another objective."""
    run = RunConfig.model_validate(expand_preset({"algorithm": name, **TASK, **NAMED.get(name, {})}))
    kind = run.likelihood.kind
    changes = {
        "snapshots": {},
        "eval": {**run.eval.model_dump(), "snapshot": "current"},
        "anchors": [],
        "rollout": {**run.rollout.model_dump(), "snapshot": "current"},
        "likelihood": {"kind": kind, "old": "detach", **({"share": ["t", "noise"]} if kind == "forward" else {})},
        "objective": {"kind": "clipped", "clip_low": 0.7},
        "rehearsal": None,
    }
    before = RunConfig.model_validate({**run.model_dump(by_alias=True), **changes})
    (tmp_path / "config.yaml").write_text(to_yaml(before), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml") == before
    later = read_config(tmp_path / "config.yaml", ["train.steps=7"])
    assert later == before.model_copy(update={"train": before.train.model_copy(update={"steps": 7})})


@pytest.mark.parametrize("name", PRESETS)
def test_preset_leaves_the_task_to_the_recipe(name: str) -> None:
    settings = PRESETS[name].settings
    assert not {"model", "data", "rewards", "watch", "checkpoint", "output_dir"} & set(settings)
    assert set(settings.get("eval", {})) <= {"snapshot"}
    assert not {"steps", "guidance"} & set(settings.get("rollout", {}))
    assert set(settings.get("train", {})) <= {"aggregation"}


EVALUATED = {
    name: PRESETS[name].settings["snapshots"]["average"]
    for name in ("awm", "flow_grpo", "flow_grpo_fast", "cps", "grpo_guard", "precise", "nft")
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_evaluate_the_weights_that_their_authors_evaluate(name: str) -> None:
    run = RunConfig.model_validate(expand_preset({"algorithm": name, **TASK, **NAMED.get(name, {})}))
    assert run.eval.snapshot == ("average" if name in EVALUATED else "current")
    expected = {"awm": (0.99, 1), "nft": (0.9, 1)}.get(name, (0.9, 8))
    if name in EVALUATED:
        assert (EVALUATED[name]["decay"], EVALUATED[name]["every"]) == expected


def test_presets_are_not_changed_by_expanding() -> None:
    before = repr({name: preset.settings for name, preset in PRESETS.items()})
    for name in PRESETS:
        expand_preset({"algorithm": name, **TASK})["likelihood"]["kind"] = "changed"
    assert repr({name: preset.settings for name, preset in PRESETS.items()}) == before


@pytest.mark.parametrize("recipe", [*RECIPES, *TEXT_RECIPES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_is_valid(recipe: Path) -> None:
    run = read_config(recipe)
    summary = recipe_summary(recipe)
    assert summary.endswith(".")
    assert run.algorithm in PRESETS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rewards_of_a_recipe_are_known(recipe: Path) -> None:
    run = read_config(recipe)
    known = {entry.name for entry in available()}
    assert {reward.name for reward in [*run.rewards, *run.watch] if reward.name} <= known


def test_every_preset_has_a_recipe() -> None:
    assert {read_config(recipe).algorithm for recipe in RECIPES} == set(IMAGE_PRESETS)
    assert {read_config(recipe).algorithm for recipe in TEXT_RECIPES} == set(PRESETS) - set(IMAGE_PRESETS)


@pytest.mark.parametrize("recipe", TEXT_RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_of_the_language_model_has_the_commands_for_its_rows(recipe: Path) -> None:
    run, text = read_config(recipe), recipe.read_text()
    assert recipe_summary(recipe).endswith(".")
    assert run.data.evaluation == "arithmetic:eval"
    assert run.output_dir == Path("runs/text") / recipe.stem
    read = [] if run.data.rows == "prompts" else [run.data.train]
    read += [] if run.rehearsal is None else [run.rehearsal.train]
    assert all(f"--out {Path(file).parent}" in text for file in read)


@pytest.mark.parametrize(
    "recipe",
    [r for r in RECIPES if "gpu" not in r.stem],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_recipe_of_the_tiny_model_trains_and_evaluates_on_different_prompts(recipe: Path) -> None:
    run = read_config(recipe)
    made = "data/shapes-pairs/pairs.jsonl"  # by the command in the recipe's head, from shapes:train
    task = {"tiny-sd3": "shapes", "tiny-sd": "shapes", "tiny-wan": "moving_shapes"}[run.model.path]
    train = {"prompts": f"{task}:train", "pairs": made}[run.data.rows]
    assert (run.data.train, run.data.evaluation) == (train, f"{task}:eval")
    assert (f"--out {Path(made).parent}" in recipe.read_text()) == (run.data.rows == "pairs")
    assert [reward.label for reward in run.watch] == ["geneval" if task == "moving_shapes" else "judge"]
