"""A resumed run names the files beside its recipe that have changed since it was last started."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from difrl.training import input_digests
from difrl.training.input_digests import digest_inputs, find_changes
from difrl.training.inputs import load_inputs
from tests.recipes import recipe
from tests.training.test_run import UNSEEN, resumed, small, train

REWARD = "def mine(images, prompts, metadata, path=''):\n    return images.mean(dim=(1, 2, 3))\n"


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def test_every_changed_input_is_named_once(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, the module of a reward, a file in its options, a file of the model. Nothing is said where nothing changed."""
    model = tmp_path / "model"
    shutil.copytree(sd3, model)
    (tmp_path / "three.txt").write_text("a red circle\na blue square\na green circle\n")
    (tmp_path / "my_inputs.py").write_text(REWARD)
    (tmp_path / "table.csv").write_text("1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    mine = {"import": "my_inputs:mine", "options": {"path": "table.csv"}}
    config = small(model, tmp_path / "run", **UNSEEN, data={"train": "three.txt"}, rewards=[mine], train={"steps": 1})
    train(config)
    assert resumed(config) == []
    changes: dict[str, Callable[[], None]] = {
        "data.train (three.txt)": lambda: edit(tmp_path / "three.txt"),
        "rewards.mine.import (my_inputs.py)": lambda: edit(tmp_path / "my_inputs.py"),
        "rewards.mine.options.path (table.csv)": lambda: edit(tmp_path / "table.csv"),
        "model.path (tokenizer/tokenizer_config.json)": lambda: edit(model / "tokenizer" / "tokenizer_config.json"),
        "model.path (notes.md)": lambda: (model / "notes.md").touch(),
    }
    for change in changes.values():
        change()
    (message,) = resumed(config)
    assert message.startswith("changed since the run was last started: ")
    assert sorted(message.partition(": ")[2].partition(";")[0].split(", ")) == sorted(changes)
    assert resumed(config) == []
    (tmp_path / "run" / "inputs.json").write_text("{")
    edit(tmp_path / "three.txt")
    assert resumed(config) == []
    sys.modules.pop("my_inputs", None)


def test_a_changed_byte_of_a_large_file_is_noticed_where_pieces_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the same size that differ everywhere, in the first or in the last bytes."""
    monkeypatch.setattr(input_digests, "WHOLE", 1000)
    monkeypatch.setattr(input_digests, "PIECE", 100)
    path = tmp_path / "prompts.txt"
    config = recipe("nowhere", tmp_path / "run", data={"train": str(path)})

    def digests(content: bytes) -> input_digests.Digests:
        path.write_bytes(content)
        return digest_inputs(config, {})

    before = digests(bytes(5000))
    assert find_changes(before, digests(bytes(5000))) == []
    for other in (b"\x01" * 5000, b"\x01" + bytes(4999), bytes(4999) + b"\x01", bytes(5001)):
        assert find_changes(before, digests(other)) == ["data.train (prompts.txt)"]


def test_inputs_that_are_not_files_have_no_digest(tmp_path: Path) -> None:
    odd = {"a": "x" * 5000, "b": "a\0b", "c": "", "d": "no such file"}
    config = recipe("some/hub-id", tmp_path, rewards=[{"import": "no_such_module:f", "options": odd}])
    assert digest_inputs(config, {}) == {}


def test_changed_images_of_rows_are_named(tmp_path: Path) -> None:
    """Input images of prompts and recorded images, wherever their folder was moved. Old run folders have none."""
    for name in ("cat", "dog", "chosen", "rejected"):
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(tmp_path / f"{name}.png")
    rows = [
        {"prompt": "x", "image": f"{name}.png", "chosen": "chosen.png", "rejected": "rejected.png"}
        for name in ("cat", "dog")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "x", "image": "cat.png"}))

    def digests(folder: Path) -> input_digests.Digests:
        data = {"train": str(folder / "pairs.jsonl"), "rows": "pairs", "group_size": 2}
        config = recipe("nowhere", folder / "run", data={**data, "evaluation": str(folder / "eval.jsonl")})
        return digest_inputs(config, load_inputs(config, 1).images)

    before = digests(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert find_changes(before, digests(tmp_path / "moved")) == []
    edit(tmp_path / "cat.png")
    edit(tmp_path / "rejected.png")
    found = ["data.train images (cat.png)", "data.train images (rejected.png)", "data.evaluation images (cat.png)"]
    now = digests(tmp_path)
    assert find_changes(before, now) == found
    assert find_changes({key: value for key, value in before.items() if not key.endswith("images")}, now) == []
