"""Published models: their numbers of weights, the table of them, and the memory that recipes for a GPU name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.models import FACTS, PAGES, build_table, count_memory, measure, replace_table
from difrl.config.load import read_config
from difrl.runtime.paths import PACKAGE, recipes
from difrl.training.cost.estimate import estimate
from tests.published import MODELS, PARTS, build_folder, build_part, count_weights
from tests.tiny_pipelines import FAMILIES

ROWS = json.loads(FACTS.read_text(encoding="utf-8"))
ROOT = PACKAGE.parent
RECIPES = {name: path for name, path in recipes().items() if name.endswith("-gpu")}


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if "size" in part or "billion" in part])
def test_a_part_has_the_published_number_of_weights(name: str) -> None:
    """`size` is read from the published files, `billion` is the number that is published, to its digits."""
    part, found = PARTS[name], count_weights(build_part(name))
    if "size" in part:
        assert found == part["size"]
    else:
        digits = len(part["billion"].partition(".")[2])
        assert f"{found / 1e9:.{digits}f}" == part["billion"]


def test_every_number_has_its_source() -> None:
    assert all(part["source"] for part in (*PARTS.values(), *(model["scheduler"] for model in MODELS.values())))
    used = {part for model in MODELS.values() for part in model["parts"].values()}
    assert used == PARTS.keys()


def test_the_tables_are_those_of_the_facts() -> None:
    assert list(ROWS) == list(MODELS)
    for name, model in MODELS.items():
        assert all(ROWS[name][key] == model[key] for key in ("title", "path", "pipeline", "rollout", "verified"))
    for page, columns in PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert replace_table(text, build_table(ROWS, columns)) == text


def test_a_model_is_verified_by_a_tiny_pipeline_of_its_class() -> None:
    tiny = {family.pipeline.__name__ for family in FAMILIES.values()} | {
        "StableDiffusion3Pipeline",
        "QwenImageEditPipeline",
    }
    assert {model["pipeline"] for model in MODELS.values()} <= tiny
    assert all((ROOT / model["verified"]).is_file() for model in MODELS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_facts_are_those_of_the_configuration(name: str) -> None:
    assert measure(name) == ROWS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_the_memory_that_it_takes(name: str, tmp_path: Path) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    path = read_config(RECIPES[name]).model.path
    (model,) = [model for model, row in MODELS.items() if row["path"] == path]
    folder = build_folder(model, tmp_path / "model")
    for stem in ("train", "evaluation"):
        rows = [f"sign number {number}" for number in range(64)]
        (tmp_path / f"{stem}.txt").write_text("\n".join(rows), encoding="utf-8")
        lines = [json.dumps({"prompt": row, "text": row}) for row in rows]
        (tmp_path / f"{stem}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = re.findall(r"^  (train|evaluation): prompts/(\S+)", text, re.M)
    overrides = [f"data.{key}={tmp_path / file}" for key, file in files]
    found = estimate(read_config(RECIPES[name], [f"model.path={folder}", *overrides]))
    (written,) = re.findall(r"Memory by `difrl check`: (\S+) GiB", text)
    assert count_memory(found) == float(written)
