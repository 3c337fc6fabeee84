"""`difrl pairs`: best against worst, no ties, and the same pairs after any number of interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from difrl.cli import app
from difrl.config import RunConfig
from difrl.data.modality import IMAGES, read_images
from difrl.data.prompts import load_prompts
from difrl.data.recorded_samples import load_recorded_samples
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.inference.preference_pairs import BestAndWorst, PairsError, Progress, Selection, Solved, make_pairs
from difrl.training.rollout_source import PolicyRollouts
from tests.recipes import recipe

DATA = {"train": "shapes:train", "prompts_per_step": 2, "group_size": 4}


def config_of(model: Path, /, **sections: Any) -> RunConfig:
    return recipe(model, data=DATA, rollout={"steps": 2}, **sections)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scored_by_hand(monkeypatch: pytest.MonkeyPatch, rewards: list[list[float]]) -> None:
    """Make rollouts one group of three gray images a step, with these rewards; NaN marks a sample without a score."""

    def draw(self: PolicyRollouts, step: int, attempt: int, groups: Any, lap: Any) -> ScoredRollout:
        values = torch.tensor(rewards[step % len(rewards)])
        images = torch.tensor([0.0, 0.4, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
        prompts, numbers = (self.prompts[step],) * 3, torch.arange(3)
        rollout = Rollout(prompts, torch.zeros(3, dtype=torch.int64), numbers, {}, images)
        return ScoredRollout(rollout, values.nan_to_num(9.0), values.isfinite())

    monkeypatch.setattr(PolicyRollouts, "draw", draw)


def test_best_and_worst_of_each_group(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = float("nan")
    scored_by_hand(monkeypatch, [[0.2, 0.9, 0.1], [0.5, 0.5, 0.5], [nan, 1.0, nan], [nan, 0.3, 0.4]])
    assert make_pairs(config_of(sd3), tmp_path, 2) == Progress(pairs=2, ties=1, unscored=1, steps=4)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    levels = [[float(read_images([tmp_path / row[k]]).mean()) for k in ("chosen", "rejected")] for row in rows]
    # 8 bits a channel: 0.4 is 102/255 exactly
    assert levels == [pytest.approx([0.4, 1.0]), pytest.approx([1.0, 0.4])]


@pytest.mark.parametrize(("rows", "selection"), [("pairs", BestAndWorst()), ("samples", Solved(0.0))])
def test_input_images_are_copied_into_the_folder(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, selection: Selection
) -> None:
    """Two prompts with one image, which the folder has once. The file can be read wherever the folder is."""
    scored_by_hand(monkeypatch, [[0.2, 0.9, 0.1]])
    Image.new("RGB", (9, 5), (7, 0, 0)).save(tmp_path / "cat.png")
    given = {"image": "cat.png", "mask": "cat.png", "metadata": {"n": 1}}
    lines = [json.dumps({"prompt": text, **given}) for text in ("red", "blue")]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    config = recipe(sd3, data={**DATA, "train": str(tmp_path / "edits.jsonl")}, rollout={"steps": 2})
    monkeypatch.setattr("difrl.policies.diffusion.policy.DiffusionPolicy.validate_prompts", lambda *a: None)
    make_pairs(config, tmp_path / "made", 2, selection=selection)
    made = (tmp_path / "made").rename(tmp_path / "elsewhere")
    data = recipe(sd3, data={"train": str(made / f"{rows}.jsonl"), "rows": rows, "group_size": 2}).data
    groups = load_recorded_samples(data, IMAGES)
    assert {group.prompt.text for group in groups} <= {"red", "blue"}
    assert [group.prompt.metadata for group in groups] == [{"n": 1}] * len(groups)
    (copy,) = (made / "inputs").iterdir()
    assert {path for group in groups for path in group.prompt.files.values()} == {copy}
    assert copy.read_bytes() == (tmp_path / "cat.png").read_bytes()


def test_rewards_without_difference_end_with_advice(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored_by_hand(monkeypatch, [[0.5, 0.5, 0.5]])
    with pytest.raises(PairsError, match=r"20 steps of 2 groups gave no pair \(20 ties.*larger data\.group_size"):
        make_pairs(config_of(sd3), tmp_path, 1)


def test_pairs_can_be_trained_on(sd3: Path, tmp_path: Path) -> None:
    config = config_of(sd3)
    made = make_pairs(config, tmp_path / "made", 5)
    assert made == Progress(pairs=6, steps=3)  # two groups a step
    data = recipe(sd3, data={"train": str(tmp_path / "made/pairs.jsonl"), "rows": "pairs", "group_size": 2}).data
    examples = load_recorded_samples(data, IMAGES)
    asked = {p.text: p.metadata for p in load_prompts("shapes:train")}
    assert [e.prompt.metadata == asked[e.prompt.text] for e in examples] == [True] * 6
    assert len({path for e in examples for path in e.items}) == 12


def test_interrupted_and_continued_is_the_same(sd3: Path, tmp_path: Path) -> None:
    config = config_of(sd3)
    make_pairs(config, tmp_path / "whole", 5)
    whole = contents(tmp_path / "whole")
    make_pairs(config, tmp_path / "parts", 1)
    rows = (tmp_path / "parts/pairs.jsonl").read_text()
    (tmp_path / "parts/pairs.jsonl").write_text(rows + '{"killed": "between the two files"}\n')
    make_pairs(config, tmp_path / "parts", 3)
    assert make_pairs(config, tmp_path / "parts", 4).pairs == 4  # nothing to do
    make_pairs(config, tmp_path / "parts", 5)
    assert contents(tmp_path / "parts")["pairs.jsonl"] == whole["pairs.jsonl"]
    images = {name: data for name, data in whole.items() if name.endswith(".png")}
    assert {name: data for name, data in contents(tmp_path / "parts").items() if name in images} == images


def test_another_recipe_does_not_continue_a_folder(sd3: Path, tmp_path: Path) -> None:
    make_pairs(config_of(sd3), tmp_path, 1)
    with pytest.raises(PairsError, match="begun with other settings of seed;"):
        make_pairs(config_of(sd3, seed=1), tmp_path, 2)
    (tmp_path / "progress.json").unlink()
    with pytest.raises(PairsError, match="was not made here"):
        make_pairs(config_of(sd3), tmp_path, 2)


def test_command(sd3: Path, tmp_path: Path) -> None:
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(
        f"algorithm: awm\nmodel: {{path: {sd3}}}\ndata: {{train: 'shapes:train', prompts_per_step: 2, group_size: 3}}\n"
        "rewards: [{name: jpeg_compressibility}]\nrollout: {steps: 2}\n"
    )
    arguments = ["pairs", str(recipe_file), "seed=4", "--out", str(tmp_path / "made"), "--count", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "4 rows in" in result.output
    assert "groups left out" in result.output
    assert len((tmp_path / "made/pairs.jsonl").read_text().splitlines()) == 4
