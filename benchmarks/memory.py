"""Peak memory of a run with and without each setting that saves some, on a model of 0.13 billion random weights.

    python -m benchmarks.memory                    all rows, one child process after the other; writes docs/benchmarks/memory.md
    python -m benchmarks.memory --only casts       rows whose name contains a word, printed only

The model is a StableDiffusion3Pipeline with encoders of 0.23 billion weights, built in a temporary folder. A row is two runs of
two steps. On a CPU the memory is the resident set of a process, on CUDA the memory that torch allocates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown
from difrl.tasks import shapes

MIB = 2**20
RECIPE: Mapping[str, Any] = {
    "algorithm": "awm",
    "model": {
        "train": "lora",
        "lora": {"rank": 16},
        "dtype": "float32",
        "gradient_checkpointing": True,
        "max_sequence_length": 16,
    },
    "data": {"evaluation": None, "prompts_per_step": 2, "group_size": 2},
    "rewards": [{"name": "jpeg_compressibility"}],
    "rollout": {"steps": 2, "guidance": 1.0, "batch": 4, "height": 64, "width": 64},
    "likelihood": {"kind": "forward", "decisions": 1},
    "train": {"steps": 2, "micro_batch": 2, "lr": 1.0e-4, "threads": 1},
    "eval": {"every": 0},
    "checkpoint": {"every": 0},
}
FULL = ("model.train=full",)
HALF = ("model.dtype=bfloat16",)
LARGE = ("rollout.height=256", "rollout.width=256", "data.group_size=4", "rollout.batch=8")


def keep_encoders() -> None:
    """Keep encoders where they were used, as before they were dropped."""
    from difrl.policies.diffusion.families.encoders import Encoders

    Encoders.drop = lambda self: None  # type: ignore[method-assign]


def decode_all() -> None:
    """Decode `rollout.batch` images of any size at once."""
    from difrl.policies.diffusion import sampling

    sampling.DECODED_PIXELS = 2**60


def keep_casts() -> None:
    """Let autocast keep its casts of weights through a pass."""
    autocast: Any = torch.autocast
    torch.autocast = lambda *args, **kwargs: autocast(*args, **{**kwargs, "cache_enabled": True})  # type: ignore


def cast_inputs() -> None:
    """Let PEFT cast the inputs of adapted layers to float32."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.cast_input_dtype_enabled = property(lambda self: True, lambda self, value: None)  # type: ignore


@dataclass(frozen=True)
class Side:
    """A run that is measured."""

    overrides: tuple[str, ...] = ()
    patch: Callable[[], None] | None = None
    """Restores code that takes more memory."""
    cached: bool = True
    """Whether the embeddings of all prompts are on the disk."""
    processes: int = 1


@dataclass(frozen=True)
class Row:
    """A setting, and the runs without and with it."""

    name: str
    without: Side
    with_it: Side


SHARDED = (*FULL, "model.shard=weights")
TILED = ("rollout.height=512", "rollout.width=512", "rollout.batch=1", "data.group_size=2", "train.micro_batch=1")
WIDE = ("train.micro_batch=4", "model.gradient_checkpointing=false")
ROWS = (
    Row("encoders dropped after the prompts", Side(patch=keep_encoders, cached=False), Side(cached=False)),
    Row("embeddings on the disk: no encoders", Side(patch=keep_encoders, cached=False), Side()),
    Row("8 images of 256 pixels decoded 4 at a time", Side(LARGE, decode_all), Side(LARGE)),
    Row("`model.tiling`, images of 512 pixels", Side(TILED), Side((*TILED, "model.tiling=true"))),
    Row("casts of weights not kept, full training in bfloat16", Side((*FULL, *HALF), keep_casts), Side((*FULL, *HALF))),
    Row("inputs of adapters not cast, bfloat16", Side((*WIDE, *HALF), cast_inputs), Side((*WIDE, *HALF))),
    Row("`model.gradient_checkpointing`", Side(WIDE), Side(WIDE[:1])),
    Row("`model.dtype: bfloat16`", Side(), Side(HALF)),
    Row("`model.train: lora`", Side(FULL), Side()),
    Row("`model.quantize: int8`, bfloat16", Side(HALF), Side((*HALF, "model.quantize=int8"))),
    Row("`train.optimizer: adamw8bit`, full training", Side(FULL), Side((*FULL, "train.optimizer=adamw8bit"))),
    Row("`model.shard: weights`, full training, 2 processes", Side(FULL, processes=2), Side(SHARDED, processes=2)),
)


def build_model(folder: Path) -> None:
    """Save a random StableDiffusion3Pipeline in the format of the published ones."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from difrl.pretraining.tiny_parts import build_clip_config, build_tokenizer
    from tests.tiny_models import build_t5_tokenizer

    torch.manual_seed(0)
    tokenizer, tokenizer_3 = build_tokenizer([p.text for p in shapes.prompts()]), build_t5_tokenizer()
    clip = build_clip_config(tokenizer, 768, projection_dim=768)
    clip.num_hidden_layers, clip.num_attention_heads = 8, 12
    t5 = T5Config(
        vocab_size=len(tokenizer_3),
        d_model=1536,
        d_kv=64,
        num_heads=24,
        num_layers=4,
        d_ff=4096,
        feed_forward_proj="gated-gelu",
    )
    transformer = SD3Transformer2DModel(
        sample_size=64,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=12,
        caption_projection_dim=768,
        joint_attention_dim=1536,
        pooled_projection_dim=1536,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )
    vae = AutoencoderKL(
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer_3,
    )
    pipeline.save_pretrained(folder)


@dataclass(frozen=True)
class Peak:
    """Peaks in bytes."""

    run: float
    """From the start of the process to its end."""
    steps: float
    """In the steps, without loading, encoding and saving."""
    estimate: float
    """What `difrl check` says that a process keeps."""


def read_peak() -> int:
    """Return the largest memory of this process since `reset_peak`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Begin a new peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def run_child(recipe: Path, side: Side, out: Path) -> None:
    """Train in this process, and write its peaks."""
    from difrl.config.load import read_config
    from difrl.training import run
    from difrl.training.trainer import Trainer

    if side.patch is not None:
        side.patch()
    step, before, during = Trainer.step, list[int](), list[int]()

    def measured(self: Trainer, number: int) -> Any:
        if not before:
            before.append(read_peak())
            reset_peak()
        found = step(self, number)
        during[:] = [read_peak()]
        return found

    Trainer.step = measured  # type: ignore[method-assign]
    run.train(read_config(recipe, [*side.overrides, f"output_dir={out.parent / 'run'}"]))
    peaks = {"run": max(*before, *during, read_peak()), "steps": during[0]}
    out.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(peaks))


def fill_cache(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Encode the prompts of a recipe in this process."""
    from difrl.config.load import read_config
    from difrl.policies.load import load_policy
    from difrl.training.inputs import load_inputs

    config = read_config(recipe, overrides)
    torch.set_num_threads(1)
    load_policy(config, "cuda" if torch.cuda.is_available() else "cpu").encode_prompts(load_inputs(config, 1).train)


def start(arguments: list[str], cache: str, processes: int = 1) -> None:
    """Run this program in processes of its own."""
    several = ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"] if processes > 1 else []
    environment = {
        **os.environ,
        "DIFRL_CACHE": cache,
        "MALLOC_MMAP_THRESHOLD_": str(MIB),  # so that freed tensors leave the resident set
        "OMP_NUM_THREADS": "1",
        **({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}),
    }
    command = [sys.executable, "-m", *several, "benchmarks.memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def measure(recipe: Path, row: int, name: str, work: Path) -> Peak:
    """Run a side of a row in processes of its own."""
    from difrl.config.load import read_config
    from difrl.training.cost.estimate import estimate

    side: Side = getattr(ROWS[row], name)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "peak"
        cache = str(work / "cache") if side.cached else ""
        start(["--child", str(recipe), str(row), name, str(out)], cache, side.processes)
        found = [json.loads(file.read_text()) for file in Path(folder).glob("peak.*")]
    said = estimate(read_config(recipe, side.overrides), side.processes).process_memory.peak
    return Peak(max(peak["run"] for peak in found), max(peak["steps"] for peak in found), said)


HEADER = ("setting", "peak of the run, MiB", "peak of the steps, MiB", "saved in the steps, MiB", "`difrl check`, MiB")


def describe(row: Row, without: Peak, with_it: Peak) -> list[str]:
    """Return a row of the table."""
    pairs = ((getattr(side, key) / MIB for side in (without, with_it)) for key in ("run", "steps", "estimate"))
    run, steps, said = (f"{one:,.0f} → {other:,.0f}" for one, other in pairs)
    return [row.name, run, steps, f"{(without.steps - with_it.steps) / MIB:,.0f}", said]


def page(table: str) -> str:
    """Return docs/benchmarks/memory.md."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, CPU"
    return f"""# Memory that each setting saves

`python -m benchmarks.memory` writes this page. {where}, Python {platform.python_version()}, torch {torch.__version__}.

A StableDiffusion3Pipeline with random weights: a denoiser of 0.13 billion, three text encoders of 0.23 billion, and an
autoencoder of 0.02 billion. Each row is two runs of two steps of AWM in a process of their own: without the setting → with it.
LoRA of rank 16 in float32 with gradient checkpointing and cached embeddings, unless the row says otherwise. The peak of the run
includes loading and encoding. On a CPU a peak is the resident set of the process, of which the libraries take about 600 MiB. The
last column is the estimate of `difrl check` for the same recipes, without libraries.

{table}
"""


def main() -> None:
    """Measure, print and write."""
    if sys.argv[1:2] == ["--child"]:
        recipe, row, name, out = sys.argv[2:]
        run_child(Path(recipe), getattr(ROWS[int(row)], name), Path(out))
        return
    if sys.argv[1:2] == ["--build"]:
        build_model(Path(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--fill"]:
        fill_cache(Path(sys.argv[2]), tuple(sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default="", help="a word in the names of the rows to measure; the page is not written"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/memory.md"))
    options = parser.parse_args()
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start(["--build", str(work / "model")], "")
        recipe = work / "recipe.yaml"
        (work / "prompts.txt").write_text("".join(f"{prompt.text}\n" for prompt in shapes.prompts()[:8]))
        model, data = (
            {**RECIPE["model"], "path": str(work / "model")},
            {**RECIPE["data"], "train": str(work / "prompts.txt")},
        )
        recipe.write_text(json.dumps({**RECIPE, "model": model, "data": data}))
        for overrides in ((), HALF):
            start(["--fill", str(recipe), *overrides], str(work / "cache"))
        for number, row in enumerate(ROWS):
            if options.only in row.name:
                peaks = [measure(recipe, number, side, work) for side in ("without", "with_it")]
                cells.append(describe(row, *peaks))
                print(" | ".join(cells[-1]), flush=True)
    table = markdown(HEADER, cells)
    if not options.only:
        options.out.write_text(page(table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
