"""Cost of scoring: each reward alone, behind a server, and in a thread while the next samples are drawn.

    python benchmarks/scoring.py                     about ten minutes on two quiet cores; writes docs/benchmarks/scoring.md

Large models have random weights in the published sizes and formats, made here and not kept, because time does not depend on the
weights. One CPU thread a model.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from common import markdown
from torch import Tensor

import rewards
from difrl.config import RunConfig
from difrl.config.load import read_config
from difrl.data.prompts import load_prompts
from difrl.policies.load import load_policy
from difrl.scoring import SHIPPED_OPTIONS, Scorer
from difrl.training.rollout_source import PolicyRollouts
from rewards import Reward

QUOTED = 'a sign that says "HELLO"'
SHAPES = {"tag": "single_object", "include": [{"class": "circle", "count": 1, "color": "red"}], "exclude": []}


@dataclass(frozen=True)
class Case:
    """A reward, with samples of typical cost."""

    label: str
    reward: Callable[[Path], Reward]
    count: int
    pixels: int = 0
    """Width of its images, 0 for texts."""
    prompt: str = "a red circle"


def drawings(count: int, pixels: int) -> Tensor:
    """Return images [count, 3, pixels, pixels] of flat shapes on a light ground, similar to the shapes task."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.full((count, 3, pixels, pixels), 245 / 255)
    half = pixels // 2
    images[..., :half, :half] = torch.nn.functional.interpolate(coarse, (half, half))
    return images


def signs(count: int, pixels: int, text: str = "HELLO") -> Tensor:
    """Return images of a word."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (pixels, pixels), "white")
    ImageDraw.Draw(picture).text((pixels // 8, pixels // 3), text, "black", ImageFont.load_default(pixels // 5))
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return image.expand(count, -1, -1, -1)


def clip_checkpoint(folder: Path, architecture: str) -> str:
    """Write random weights of an open_clip model in the format of HPSv2: a pickle of tensors in half precision."""
    import open_clip

    path = folder / f"{architecture}.pt"
    if not path.exists():
        state = open_clip.create_model(architecture).state_dict()
        torch.save({"state_dict": {name: value.half() for name, value in state.items()}}, path)
    return str(path)


def image_reward_checkpoint(folder: Path) -> dict[str, str]:
    """Write random weights with the published names and sizes of ImageReward, and a tokenizer of a few words."""
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    from rewards.image_reward import FILE, published_name

    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
    )
    text = BlipTextConfig(hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12)
    text.num_attention_heads, text.vocab_size = 12, 30524
    own = {f"vision.{k}": v for k, v in BlipVisionModel(vision).state_dict().items()}
    own |= {f"text.{k}": v for k, v in BlipTextModel(text, add_pooling_layer=False).state_dict().items()}
    sizes = (768, 1024, 128, 64, 16, 1)
    for layer, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        own |= {f"head.{layer}.weight": torch.randn(outputs, inputs), f"head.{layer}.bias": torch.zeros(outputs)}
    torch.save({published_name(name): value for name, value in own.items()}, folder / FILE)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return {"weights": str(folder), "tokenizer": str(folder / "bert")}


def without_files(name: str, **options: Any) -> Callable[[Path], Reward]:
    """Return the builder of a reward that needs no file."""
    return lambda folder: rewards.make(name, **options)


def open_clip_score(folder: Path) -> Reward:
    return rewards.make(
        "clip_score", model="ViT-L-14", backend="open_clip", pretrained=clip_checkpoint(folder, "ViT-L-14")
    )


CASES = (
    Case("jpeg_compressibility, 512 pixels", without_files("jpeg_compressibility"), 64, 512),
    Case("geneval, the detector of the shapes task, 32 pixels", without_files("geneval"), 256, 32),
    Case("judge, 32 pixels", without_files("judge", **SHIPPED_OPTIONS["judge"]), 256, 32),
    Case("ocr, 256 pixels", without_files("ocr", threads=1), 16, 256, QUOTED),
    Case("clip_score and aesthetic: ViT-L/14, 0.43 billion weights", open_clip_score, 8, 512),
    Case(
        "image_reward: ViT-L/16 and BERT, 0.45 billion",
        lambda folder: rewards.make("image_reward", **image_reward_checkpoint(folder)),
        8,
        512,
    ),
    Case(
        "pickscore and hpsv2: ViT-H/14, 0.99 billion",
        lambda folder: rewards.make("hpsv2", weights=clip_checkpoint(folder, "ViT-H-14")),
        4,
        512,
    ),
    Case("math", without_files("math"), 256),
    Case("exact_match", without_files("exact_match"), 4096),
    Case("format", without_files("format", pattern=r"[\s\S]*=\s*\d+"), 4096),
)


def build_samples(case: Case) -> tuple[Any, list[str], list[Mapping[str, Any]]]:
    """Return samples, prompts and metadata. Texts differ, because math caches what it has parsed."""
    metadata: list[Mapping[str, Any]] = [{**SHAPES, "answer": str(i)} for i in range(case.count)]
    if case.pixels:
        draw = signs if case.prompt == QUOTED else drawings
        return draw(case.count, case.pixels), [case.prompt] * case.count, metadata
    texts = [f"{i} + {i} is twice {i}, so the answer is {2 * i}" for i in range(case.count)]
    return texts, [f"{i}+{i}=" for i in range(case.count)], metadata


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the median time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def speed_rows(repeats: int) -> list[list[str]]:
    """Measure every case: samples a second, and seconds until the first sample is scored."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            reward = case.reward(Path(scratch))
            samples, prompts, metadata = build_samples(case)
            first = timed(partial(rewards.score, reward, samples[:1], prompts[:1], metadata[:1]), 1)
            # math caches what it has parsed, so only its first round counts.
            whole = partial(rewards.score, reward, samples, prompts, metadata)
            rate = case.count / timed(whole, 1 if case.label == "math" else repeats)
        rows.append([case.label, f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}", f"{first:.1f}"])
        print(*rows[-1], sep="  ", flush=True)
    return rows


class Slow:
    """A reward that waits, as for a remote service."""

    name, needs = "slow", ("images",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def to(self, device: torch.device | str) -> Slow:
        return self

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        time.sleep(self.seconds * len(samples))
        return samples.mean((1, 2, 3))


def overlap_rows(repeats: int) -> list[list[str]]:
    """Measure drawing and scoring a step's samples of the shipped image model, one after the other and at the same time."""
    ocr = rewards.make("ocr", threads=1)

    def read(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> object:
        return ocr(images, [QUOTED] * len(prompts), metadata)

    given: Mapping[str, Reward] = {
        "ocr (computes, one thread of its own)": rewards.Function("ocr", read),
        "geneval (computes, short)": rewards.make("geneval"),
        "a service that takes 20 ms an image": Slow(0.02),
    }
    base = read_config("quickstart", ["rollout.batch=24", "data.prompts_per_step=8", "data.group_size=12"])
    policy, rows = load_policy(base, torch.device("cpu"), keep_base=False), []
    for label, reward in given.items():
        scorer = Scorer.from_rewards({"reward": (reward, 1.0)}, {})
        seconds = [_drawing(base, policy, scorer, overlap, repeats) for overlap in (False, True)]
        rows.append([label, *(f"{s:.2f}" for s in seconds), f"{seconds[1] / seconds[0]:.2f}"])
        print(*rows[-1], sep="  ", flush=True)
    return rows


def _drawing(base: RunConfig, policy: Any, scorer: Scorer, overlap: bool, repeats: int) -> float:
    config = base.model_copy(update={"rollout": base.rollout.model_copy(update={"overlap": overlap})})
    source = PolicyRollouts(config, policy, scorer, load_prompts(config.data.train), torch.device("cpu"))
    groups = range(config.groups)
    source.draw(0, 0, groups, lambda name: None)
    return timed(lambda: source.draw(0, 0, groups, lambda name: None), repeats)


SERVED = ("jpeg_compressibility", "geneval", "ocr")


@contextmanager
def server(names: Sequence[str]) -> Iterator[str]:
    """Run `difrl serve` in a separate process and yield its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "difrl", "serve", *names, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").is_success:
                    break
            time.sleep(0.1)
        yield url
    finally:
        running.terminate()
        running.wait()


def server_rows(repeats: int) -> list[list[str]]:
    """Measure scoring the same samples in this process and by a server on the same machine."""
    rows = []
    cases = [case for name in SERVED for case in CASES if case.label.startswith(name)]
    with server(SERVED) as url, tempfile.TemporaryDirectory() as scratch:
        for name, case in zip(SERVED, cases, strict=True):
            samples, prompts, metadata = build_samples(case)
            own, remote = case.reward(Path(scratch)), rewards.make("remote", url=url, reward=name)
            works = [partial(rewards.score, reward, samples, prompts, metadata) for reward in (own, remote)]
            if not torch.equal(*(work().values for work in works)):
                raise SystemExit(f"{name}: the server's scores differ from this process's")
            rates = [case.count / timed(work, repeats) for work in works]
            rows.append([case.label, *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"])
            print(*rows[-1], sep="  ", flush=True)
    return rows


def page(speed: list[list[str]], served: list[list[str]], overlap: list[list[str]], note: str) -> str:
    """Return docs/benchmarks/scoring.md."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"""# Cost of scoring

`python benchmarks/scoring.py` writes this page. {platform.machine()}, {os.cpu_count()} cores, {versions}. {note}

## A reward alone

One thread in torch and onnxruntime, float32. Large models have random weights in the published sizes and formats. `first` is the
time until the first sample is scored, including loading and without downloading. Measured without a GPU.

{markdown(("reward", "samples a second", "first, s"), speed)}

## Behind a server

The same samples scored by `difrl serve` in a separate process on the same machine, with PNG encoding, HTTP and decoding. The
scores are the same to the last bit. The ratio is of times. It is below 1 if the server scores while this process still encodes.

{markdown(("reward", "here, samples/s", "server, samples/s", "server / here"), served)}

## While the next samples are drawn

A step of 96 samples of the shipped image model, drawn 24 at a time and scored, with `rollout.overlap: false` and `true`. Samples
and scores are the same.

{markdown(("reward", "after, s", "meanwhile, s", "meanwhile / after"), overlap)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="sentence on the circumstances, such as a shared machine")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/scoring.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    overlap, served, speed = overlap_rows(args.repeats), server_rows(args.repeats), speed_rows(args.repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(speed, served, overlap, args.note), encoding="utf-8")


if __name__ == "__main__":
    main()
