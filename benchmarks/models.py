"""Facts about published models: difrl/reporting/models.json, and the tables of docs/models.md and README.md.

    python -m benchmarks.models                  estimates the models that the file lacks, then writes the tables
    python -m benchmarks.models flux1-dev …      estimates these again

Memory is the estimate of `difrl check`. It takes about 15 seconds a model and no weights.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks.common import markdown
from difrl.config import RunConfig
from difrl.config.load import read_config
from difrl.policies.diffusion.load import get_family_class
from difrl.reporting import catalog
from difrl.runtime.paths import PACKAGE, recipes
from difrl.training.cost.estimate import Estimate, estimate
from samplers import FlowMatching, Process, VariancePreserving
from tests.published import MODELS, PARTS, build_folder, count_weights

FACTS = Path(catalog.__file__).with_name("models.json")
SHORT = ("model", "pipeline", "medium", "memory of a LoRA run")
COLUMNS = ("model", "pipeline", "medium", "process", "memory of a LoRA run", "verified by")
PAGES: Mapping[Path, Sequence[str]] = {PACKAGE.parent / "docs/models.md": COLUMNS, PACKAGE.parent / "README.md": SHORT}
"""Page -> columns of its table."""
LORA = ("model.train=lora", "model.lora.rank=32", "model.dtype=bfloat16", "model.gradient_checkpointing=true")
GIB = 2**30
PROCESSES: Mapping[type[Process], str] = {FlowMatching: "flow matching", VariancePreserving: "variance preserving"}


def read_recipe(name: str, folder: Path) -> RunConfig:
    """Return a LoRA run of a published model at its size, one sample a pass. Prompts of its own are beside the folder."""
    size = MODELS[name]["rollout"]
    Image.new("RGB", (size["width"], size["height"])).save(folder.parent / "input.png")
    image = {"image": "input.png"} if MODELS[name].get("medium") in ("editing", "image to video") else {}
    rows = [{"prompt": f"a sign with the number {number}", **image} for number in range(24)]
    file = folder.parent / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rollout = ["rollout.batch=1", *(f"rollout.{key}={value}" for key, value in size.items())]
    data = [f"data.train={file}", f"data.evaluation={file}", "rewards=[{name: jpeg_compressibility}]", "watch=[]"]
    own = [f"model.path={folder}", *LORA, *rollout, *data, "eval.images=8", "train.micro_batch=1", "train.steps=2"]
    return read_config(recipes()["awm"], own)


def count_memory(found: Estimate) -> float:
    """Return the memory of an estimate in GiB. It is rough, so it has no decimals above 10."""
    memory = found.process_memory.peak / GIB
    return round(memory, 1 if memory < 10 else 0)


def measure(name: str) -> dict[str, Any]:
    """Return the facts about a published model."""
    model = MODELS[name]
    with TemporaryDirectory() as parent:
        folder = build_folder(name, Path(parent) / name)
        family = get_family_class(str(folder), None).build_skeleton(str(folder), None)
        found = estimate(read_recipe(name, folder))
    denoiser = count_weights(family.denoiser)
    parts = [*map(PARTS.__getitem__, model["parts"].values()), model["scheduler"]]
    return {
        **{key: model[key] for key in ("title", "path", "pipeline", "rollout", "verified")},
        "medium": model.get("medium", "image"),
        "process": PROCESSES[type(family.process)],
        "targets": list(family.lora_targets),
        "weights": round(denoiser / 1e9, 3),
        "frozen": round(sum(map(count_weights, family.modules)) / 1e9 - denoiser / 1e9, 3),
        "memory": f"{'' if found.model.forward else 'more than '}{count_memory(found):g} GiB",
        "unsure": [*(part["unsure"] for part in parts if "unsure" in part), *found.model.notes],
    }


def build_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return a table of one row a model."""
    cells = [
        {
            "model": f"[{row['title']}](https://huggingface.co/{row['path']})",
            "pipeline": f"`{row['pipeline']}`",
            "medium": row["medium"],
            "process": row["process"],
            "memory of a LoRA run": row["memory"],
            "verified by": f"`{row['verified']}`",
        }
        for row in rows.values()
    ]
    return markdown(columns, [[row[column] for column in columns] for row in cells])


def replace_table(page: str, table: str) -> str:
    """Return a page with another table in the place of its own."""
    found, count = re.subn(r"(?<=\n)\| model \| pipeline \| medium \|.*\n(?:\|.*\n)+", lambda _: f"{table}\n", page)
    if count != 1:
        raise ValueError(f"found {count} tables of models on a page, expected 1")
    return found


def main(names: Sequence[str]) -> None:
    """Estimate models and write the file and the tables."""
    known = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}
    rows = {name: known[name] if name in known and name not in names else measure(name) for name in MODELS}
    FACTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for page, columns in PAGES.items():
        page.write_text(replace_table(page.read_text(encoding="utf-8"), build_table(rows, columns)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
