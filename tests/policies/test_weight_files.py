"""Weights that cannot be loaded are found by the headers and names of their files, which takes no time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from difrl.policies.weight_files import check_weights
from difrl.training.cost.estimate import estimate
from tests.recipes import recipe, text_recipe
from tests.texts import prompt_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def write_shards(folder: Path, present: int) -> None:
    save_file({"weight": torch.zeros(3, 2)}, folder / "model-1.safetensors")
    save_file({"bias": torch.zeros(3)}, folder / "model-2.safetensors")
    shards = {"weight": "model-1.safetensors", "bias": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "model.safetensors").unlink()
    for number in range(present + 1, 3):
        (folder / f"model-{number}.safetensors").unlink()


def write_pickle(folder: Path) -> None:
    torch.save({"weight": torch.zeros(3, 2)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


WHOLE: dict[str, Callable[[Path], object]] = {
    "one file": lambda folder: None,
    "two files": lambda folder: write_shards(folder, 2),
    "a pickle, where the loader takes one": write_pickle,
    "other names": lambda folder: save_file({"old.name": torch.zeros(9)}, folder / "model.safetensors"),
}
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights, expected model\.safetensors"),
    "no folder": (shutil.rmtree, "holds no weights"),
    "fp16 alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.fp16.safetensors"),
        r"holds only model\.fp16\.safetensors, expected .*standard variant",
    ),
    "another library's": (
        lambda folder: (folder / "model.safetensors").rename(folder / "flax_model.msgpack"),
        r"holds only flax_model\.msgpack, expected .*safetensors files",
    ),
    "pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "pointer of git-lfs.*git lfs pull"),
    "empty": (lambda folder: cut(folder / "model.safetensors", 0), "is empty"),
    "header cut": (lambda folder: cut(folder / "model.safetensors", 20), "damaged or cut off"),
    "data cut": (lambda folder: cut(folder / "model.safetensors", -4), "damaged or cut off"),
    "a web page": (lambda folder: (folder / "model.safetensors").write_text("<html>404</html>" * 9), "damaged"),
    "a folder": (
        lambda folder: [(folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()],
        "holds only model",
    ),
    "shard missing": (lambda folder: write_shards(folder, 1), r"lacks model-2\.safetensors, one of 2 files"),
    "shard pointer": (
        lambda folder: [write_shards(folder, 2), (folder / "model-2.safetensors").write_text(POINTER)],
        "model-2.safetensors is a pointer",
    ),
    "index cut": (
        lambda folder: [write_shards(folder, 2), cut(folder / "model.safetensors.index.json", 20)],
        "index.json cannot be read",
    ),
    "pickle cut": (lambda folder: [write_pickle(folder), cut(folder / "pytorch_model.bin", -50)], "cut off"),
    "tensor missing": (
        lambda folder: save_file({"weight": torch.zeros(3, 2)}, folder / "model.safetensors"),
        "lack 1 tensors that config.json describes, such as bias",
    ),
    "another width": (
        lambda folder: save_file({"weight": torch.zeros(3, 4)}, folder / "model.safetensors"),
        r"weight has the shape \[3, 4\] in .*, and \[3, 2\] by config\.json",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    return tmp_path


def check(folder: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    check_weights(folder, ["model.safetensors", "pytorch_model.bin"], module, "model.path")


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_weights_are_accepted(folder: Path, kind: str) -> None:
    WHOLE[kind](folder)
    check(folder)


def test_shared_weights_are_in_a_file_once(folder: Path) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"one": nn.Linear(2, 3), "other": nn.Linear(2, 3, bias=False)})
    module["other"].weight = module["one"].weight
    save_file({"one.weight": torch.zeros(3, 2), "one.bias": torch.zeros(3)}, folder / "model.safetensors")
    check_weights(folder, ["model.safetensors"], module, "model.path")


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_weights_are_refused_by_name(folder: Path, kind: str) -> None:
    change, match = BROKEN[kind]
    change(folder)
    with pytest.raises(ModelError, match=rf"^model\.path: .*{match}"):
        check(folder)


@pytest.mark.parametrize("damage", ["cut", "pointer", "missing", "wide"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "lm"])
def test_a_run_does_not_begin_with_them(sd3: Path, lm: Path, tmp_path: Path, part: str, damage: str) -> None:
    """The loaders of diffusers and transformers raise errors of many kinds, or fill missing weights with random ones."""
    model = Path(shutil.copytree(lm if part == "lm" else sd3, tmp_path / "model"))
    (file,) = (model if part == "lm" else model / part).glob("*.safetensors")
    if damage == "cut":
        cut(file, -9)
    elif damage == "pointer":
        file.write_text(POINTER)
    else:
        tensors = load_file(file)
        name = next(name for name in tensors if "embed" in name and tensors[name].dim() == 2)
        rest = {key: value for key, value in tensors.items() if key != name}
        more = {name: tensors[name].repeat(2, 2)} if damage == "wide" else {}
        save_file({**rest, **more}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.path: "):
        load_policy((text_recipe if part == "lm" else recipe)(model))


def test_the_check_of_a_recipe_finds_them_in_every_part(sd3: Path, tmp_path: Path) -> None:
    for part, name in (("transformer", WEIGHTS), ("text_encoder_2", "model.safetensors"), ("vae", WEIGHTS)):
        model = Path(shutil.copytree(sd3, tmp_path / part))
        (model / part / name).write_text(POINTER)
        with pytest.raises(ModelError, match=rf"model\.path: .*{part}/{name} is a pointer"):
            estimate(recipe(model))
    model = Path(shutil.copytree(sd3, tmp_path / "tokenizer"))
    shutil.rmtree(model / "tokenizer_2")
    with pytest.raises(ModelError, match=r"model\.path: .*tokenizer_2 has no files, expected a CLIPTokenizer"):
        estimate(recipe(model))


def test_the_check_of_a_recipe_finds_them_in_language_models_and_teachers(lm: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(lm, tmp_path / "lm"))
    cut(broken / "model.safetensors", -8)
    data = {"train": str(prompt_file(tmp_path)), "evaluation": None}
    with pytest.raises(ModelError, match=r"model\.path: .*model\.safetensors is damaged or cut off"):
        estimate(text_recipe(broken, data=data, eval={"every": 0}))
    teachers = {"teacher": {"path": str(broken)}}
    with pytest.raises(ModelError, match=r"teachers\.teacher\.path: .*is damaged or cut off"):
        estimate(text_recipe(lm, data=data, eval={"every": 0}, teachers=teachers))


@pytest.mark.parametrize(("side", "fits"), [("height", 8), ("width", 16), ("width", 64)])
def test_a_size_without_positions_is_refused(sd3: Path, side: str, fits: int) -> None:
    """The model has positions for 4 latents of 2 pixels."""
    config = recipe(sd3, rollout={side: fits})
    if fits == 8:
        estimate(config)
        return
    with pytest.raises(ModelError, match=rf"^rollout\.{side}: found {fits} pixels, expected at most 8"):
        estimate(config)


def test_weights_that_are_packed_into_bytes_have_shapes_of_their_own(tmp_path: Path) -> None:
    """As bitsandbytes packs two weights of 4 bits into a byte when it loads a file of float ones."""
    layer = nn.Linear(4, 2, bias=False)
    save_file({"weight": layer.weight.detach()}, tmp_path / "model.safetensors")
    layer.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    check_weights(tmp_path, ["model.safetensors"], layer, "model.path")
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    layer.register_buffer("other", torch.zeros(1))
    with pytest.raises(ModelError, match="lack 1 tensors"):
        check_weights(tmp_path, ["model.safetensors"], layer, "model.path")
