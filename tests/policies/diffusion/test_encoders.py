"""Encoders of prompts have weights only while prompts are encoded, and their results are kept on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from difrl.config import ModelConfig
from difrl.data.prompts import Prompt
from difrl.inference.loaded_run import open_run
from difrl.policies.diffusion import embedding_files
from difrl.policies.diffusion.families import Family
from difrl.policies.diffusion.families.modular import ModularFamily
from difrl.policies.diffusion.load import load_family
from difrl.policies.diffusion.prompt_encoder import PromptEncoder
from difrl.policies.load import load_policy
from difrl.reporting.terminal import SilentDisplay
from difrl.training import run as running
from difrl.training.trainer import Trainer
from tests.recipes import recipe

PROMPTS = [Prompt(text, {}) for text in ("a red circle", "two blue squares", "a green triangle")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an attempt to encode a prompt fail."""

    def fail(*_: Any) -> Any:
        raise AssertionError("a prompt is encoded")

    monkeypatch.setattr(type(family), "encode_prompt", fail)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def encoder(family: Family) -> PromptEncoder:
    return PromptEncoder(family, "", None, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoders_are_loaded_for_a_prompt_with_the_weights_of_the_pipeline(sd35: Path, dtype: Any) -> None:
    family = load_family(ModelConfig(path=str(sd35), dtype=dtype))
    pipeline = DiffusionPipeline.from_pretrained(sd35, dtype=getattr(torch, dtype))
    assert set(family.encoders.modules) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    assert not family.encoders.loaded
    first = family.encode("a red circle", None, 4)
    for name, part in family.encoders.modules.items():
        assert part is getattr(family.pipeline, name) is getattr(family.modular, name)  # type: ignore[attr-defined]
        assert not part.training
        expected = dict(getattr(pipeline, name).named_parameters())
        assert same({key: p.detach() for key, p in part.named_parameters()}, expected)
        assert not any(p.requires_grad for p in part.parameters())
    family.encoders.drop()
    assert all(tensor.is_meta for part in family.encoders.modules.values() for tensor in part.parameters())
    assert same(family.encode("a red circle", None, 4), first)


def test_encoders_without_weights_cannot_be_called(sd3: Path) -> None:
    family = load_family(ModelConfig(path=str(sd3)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        family.encode_prompt("a red circle", None, None)


def test_encoders_rest_on_the_cpu_or_on_the_device(sd3: Path) -> None:
    family = load_family(ModelConfig(path=str(sd3)))
    moves = list[str]()
    family.encoders._move = lambda device: moves.append(str(device))  # type: ignore[method-assign]
    with family.encoders.at_hand("cuda"):
        assert moves == ["cuda"]
    assert moves == ["cuda"]
    family = load_family(ModelConfig(path=str(sd3), offload="encoders"))
    family.encoders._move = lambda device: moves.append(str(device))  # type: ignore[method-assign]
    with family.encoders.at_hand("cuda"):
        pass
    assert moves == ["cuda", "cuda", "cpu"]


def test_the_next_process_encodes_nothing(sd3: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_family(ModelConfig(path=str(sd3)))
    expected = [first.encode(prompt.text, None, 3) for prompt in PROMPTS]
    second = load_family(ModelConfig(path=str(sd3)))
    forbid(second, monkeypatch)
    assert all(same(second.encode(p.text, None, 3), e) for p, e in zip(PROMPTS, expected, strict=True))
    assert not second.encoders.loaded


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def exchange(file: Path) -> None:
    save_file({"embeds": torch.zeros(1, 3)}, file)


@pytest.mark.parametrize("damage", [cut, flip, empty, exchange])
def test_a_damaged_file_is_encoded_again(sd3: Path, cache: Path, damage: Callable[[Path], None]) -> None:
    family = load_family(ModelConfig(path=str(sd3)))
    expected = family.encode("a red circle", None, 3)
    (file,) = (cache / "embeddings").rglob("*.safetensors")
    whole = file.read_bytes()
    damage(file)
    assert same(family.encode("a red circle", None, 3), expected)
    assert file.read_bytes() == whole


def test_a_file_holds_for_what_it_was_computed_from(sd3: Path, cache: Path, tmp_path: Path) -> None:
    """Another text, length, image, input, dtype, number of threads, or weight of an encoder has another file."""
    one = Image.new("RGB", (4, 4))
    other = one.copy()
    other.putpixel((1, 1), (0, 0, 1))
    changed = Path(shutil.copytree(sd3, tmp_path / "model"))
    weights = load_file(changed / "text_encoder" / "model.safetensors")
    weights[next(iter(weights))].flatten()[0] += 1
    save_file(weights, changed / "text_encoder" / "model.safetensors", {"format": "pt"})
    moved = Path(shutil.copytree(sd3, tmp_path / "moved"))
    trained = Path(shutil.copytree(sd3, tmp_path / "trained"))
    (trained / "transformer" / "more.json").write_text("{}")
    families = {path: load_family(ModelConfig(path=str(path))) for path in (sd3, changed, moved, trained)}
    models = {path: family.embedding_files.model for path, family in families.items()}  # type: ignore[union-attr]
    assert models[sd3] == models[moved] == models[trained] != models[changed]
    half = load_family(ModelConfig(path=str(sd3), dtype="bfloat16")).embedding_files
    files = families[sd3].embedding_files
    assert files is not None
    assert half is not None
    assert half.model != files.model
    device, threads = torch.device("cpu"), torch.get_num_threads()
    found = [
        files.find("a", None, {}, device),
        files.find("b", None, {}, device),
        files.find("a", None, {"max_sequence_length": 3}, device),
        files.find("a", None, {"height": 16}, device),
        files.find("a", one, {}, device),
        files.find("a", other, {}, device),
        files.find("\ud800", None, {}, device),
    ]
    torch.set_num_threads(threads + 1)
    found.append(files.find("a", None, {}, device))
    torch.set_num_threads(threads)
    assert len(set(found)) == len(found)
    assert files.find("a", None, {}, device) == found[0]
    assert files.find("a", one.copy(), {}, device) == found[4]


def test_files_that_were_not_used_for_longest_are_removed(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}").mkdir()
        file = tmp_path / f"{number}" / f"{number}.safetensors"
        file.write_bytes(b"0" * 10)
        os.utime(file, (number, number))
    embedding_files.prune(tmp_path, 25)
    assert sorted(file.name for file in tmp_path.rglob("*.safetensors")) == ["2.safetensors", "3.safetensors"]


def test_a_cache_that_cannot_be_written_is_no_error(sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFRL_CACHE", str(tmp_path / "file" / "cache"))
    family = load_family(ModelConfig(path=str(sd3)))
    assert same(family.encode("a", None, None), family.encode("a", None, None))


def test_all_prompts_are_encoded_ahead(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their negative prompts. Another prompt brings the encoders back."""
    family = load_family(ModelConfig(path=str(sd3)))
    expected = encoder(family)(PROMPTS, True)
    prompts = encoder(family)
    prompts.encode_ahead(PROMPTS, True)
    assert not family.encoders.loaded
    with monkeypatch.context() as patch:
        forbid(family, patch)
        found = prompts(PROMPTS, True)
    assert same(dict(found.tensors), dict(expected.tensors))
    prompts([Prompt("another", {})], False)
    assert family.encoders.loaded


def test_processes_begin_with_different_prompts(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()

    def record(family: Any, text: str, *_: Any) -> dict[str, Tensor]:
        order.append(text)
        return {"embeds": torch.zeros(1, 1)}

    family = load_family(ModelConfig(path=str(sd3)))
    monkeypatch.setattr(type(family), "encode", record)
    prompts = [Prompt(str(number), {}) for number in range(5)]
    encoder(family).encode_ahead(prompts, False, 2 / 4)
    assert order == ["2", "3", "4", "0", "1"]


def test_embeddings_are_moved_to_the_device_once(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = encoder(load_family(ModelConfig(path=str(sd3))))
    moved = list[Tensor]()
    move = prompts._move
    monkeypatch.setattr(prompts, "_move", lambda value: moved.append(value) or move(value))
    first = prompts(PROMPTS, True)
    count = len(moved)
    again = prompts([*PROMPTS[1:], PROMPTS[1]], False)
    assert len(moved) == count
    assert torch.equal(again.tensors["prompt_embeds"], first.tensors["prompt_embeds"][[1, 2, 1]])
    prompts.dtype = torch.bfloat16
    assert prompts(PROMPTS, True).tensors["prompt_embeds"].dtype == torch.bfloat16
    assert len(moved) == 2 * count


def test_a_model_is_saved_without_encoders_in_memory(sd3: Path, tmp_path: Path) -> None:
    policy = load_policy(recipe(sd3, model={"train": "full", "dtype": "bfloat16"}))
    policy.encode_prompts(PROMPTS)
    policy.merge(tmp_path)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    saved, original = (DiffusionPipeline.from_pretrained(path, **absent) for path in (tmp_path, sd3))
    for name in ("text_encoder", "text_encoder_2"):
        weights = {key: p.bfloat16().float() for key, p in getattr(original, name).named_parameters()}
        assert same(dict(getattr(saved, name).named_parameters()), weights)
    assert not policy.family.encoders.loaded  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        {"collect": {"max_draws": 2}, "data": {"prompts_per_step": 4}},
        {"data": {"prompts_per_step": 6, "negative": "blurry"}, "rollout": {"guidance": 2.0}},
    ],
)
def test_a_run_encodes_all_of_its_prompts_before_its_first_step_and_nothing_when_it_is_resumed(
    sd3: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    config = recipe(sd3, tmp_path / "run", **{"eval": {"rlg": [0.5]}, "checkpoint": {"every": 2}, **changes})
    step, encode = Trainer.step, ModularFamily.encode_prompt
    encoded, steps = list[str](), list[int]()

    def count(family: Any, text: str, *given: Any) -> Any:
        assert not steps
        encoded.append(text)
        return encode(family, text, *given)

    monkeypatch.setattr(ModularFamily, "encode_prompt", count)
    monkeypatch.setattr(Trainer, "step", lambda self, number: steps.append(number) or step(self, number))
    running.train(config, display=SilentDisplay())
    assert steps == [0, 1, 2]
    assert len(encoded) == len(set(encoded)) > 8
    assert len(encoded) < 100  # of 585
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    encoded.clear()
    running.train(config, resume=True, display=SilentDisplay())
    assert steps[3:] == [2]
    assert not encoded
    run = open_run(tmp_path / "run", device="cpu")
    steps.clear()
    images = run.sample(["a prompt that no run has seen"]).content
    assert encoded == ["a prompt that no run has seen"]
    assert images.isfinite().all()
