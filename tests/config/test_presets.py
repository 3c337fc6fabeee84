"""Every shipped preset and recipe is valid, and is the method that it claims to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from difrl.config import RunConfig
from difrl.config.load import expand_preset, read_config, recipe_summary
from difrl.config.presets import PRESETS
from difrl.config.presets.images import IMAGE_PRESETS
from difrl.runtime import paths
from rewards import available
from tests.recipes import NAMED

RECIPES = sorted(paths.recipes_folder().glob("*.yaml"))
TEXT_RECIPES = sorted(paths.recipes_folder().glob("text/*.yaml"))
TASK = {"model": {"path": "tiny-sd3"}, "data": {"train": "shapes:train"}, "rewards": [{"name": "geneval"}]}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_expands_to_a_valid_run(name: str) -> None:
    preset = PRESETS[name]
    run = RunConfig.model_validate(expand_preset({"algorithm": name, **TASK, **NAMED.get(name, {})}))
    assert run.likelihood.kind == preset.likelihood
    assert run.objective.kind == preset.objective
    assert {anchor.label for anchor in run.anchors} == set(preset.anchor.split("+")) - {"none"}
    assert preset.advantage == f"{run.advantage.std}-std"
    # Grid coordinates are one word each: they are columns of `difrl recipes`.
    assert all(" " not in word for word in (preset.likelihood, preset.objective, preset.anchor, preset.advantage))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_leaves_the_task_to_the_recipe(name: str) -> None:
    settings = PRESETS[name].settings
    assert not {"model", "data", "rewards", "watch", "eval", "checkpoint", "output_dir"} & set(settings)
    assert not {"steps", "guidance"} & set(settings.get("rollout", {}))
    assert set(settings.get("train", {})) <= {"aggregation"}


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
    "recipe", [r for r in RECIPES if "gpu" not in r.stem], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_recipe_of_the_tiny_model_trains_and_evaluates_on_different_prompts(recipe: Path) -> None:
    run = read_config(recipe)
    made = "data/shapes-pairs/pairs.jsonl"  # by the command in the recipe's head, from shapes:train
    train = {"prompts": "shapes:train", "pairs": made}[run.data.rows]
    assert run.model.path in {"tiny-sd3", "tiny-sd"}
    assert (run.data.train, run.data.evaluation) == (train, "shapes:eval")
    assert (f"--out {Path(made).parent}" in recipe.read_text()) == (run.data.rows == "pairs")
    assert [reward.label for reward in run.watch] == ["judge"]
