"""Measurements on one GPU with random weights, for docs/gpu.md. benchmarks/gpu.sh runs it with its settings.

    awm, awm-*    Stable Diffusion 3.5 medium at 512 pixels, AWM on a LoRA in bfloat16 (configs/sd35-pickscore-gpu.yaml): images a
                  second, seconds of a step, peak memory beside the estimate of `difrl check`; alone and with each lever
    full          full fine-tune of an MMDiT of 0.3 billion weights
    ratio         ℓ of recorded denoising steps in batches of other shapes, float32 and bfloat16
    tests         the tests that need a CUDA device

Every case is a process of its own with a time limit, so a failure costs only its case and peaks are its own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import difrl  # noqa: F401 - before diffusers, which imports torchvision

SIZE, DEVICE, OUT, LIMIT = os.environ["SIZE"], os.environ["DEVICE"], Path(os.environ["OUT"]), float(os.environ["LIMIT"])
WORK = Path(os.environ["WORK"])
CASE_LIMIT = 150 if SIZE == "real" else 1200
"""Seconds of one case at most. A CPU may be busy."""
GIB = 2**30
MODEL, SMALL = WORK / "sd35-medium", WORK / "mmdit-0.3b"
Changes = Mapping[str, Mapping[str, Any]]
"""Part of a pipeline -> settings that differ from Stable Diffusion 3.5 medium."""
FEWER_WEIGHTS: Changes = {
    "transformer": {
        "num_layers": 14,
        "num_attention_heads": 12,
        "caption_projection_dim": 768,
        "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6],
    }
}
"""An MMDiT of 0.3 billion weights."""
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
FEW_WEIGHTS: Changes = {
    "transformer": {
        "num_layers": 2,
        "num_attention_heads": 1,
        "caption_projection_dim": 64,
        "dual_attention_layers": [0],
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4},
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
}
"""Small enough to try this script on a CPU."""

PROMPTS = [
    "data.train=shapes:train",
    "data.evaluation=shapes:eval",
    "rewards=[{name: jpeg_compressibility}]",
    "watch=[]",
]
SHORT = ["train.steps=3", "eval.every=0", "eval.rlg=[]", "eval.show=0", "checkpoint.every=0", *PROMPTS]
REAL = ["rollout.width=512", "rollout.height=512", "data.prompts_per_step=2", "data.group_size=8", "rollout.batch=16"]
TINY = ["rollout.width=64", "rollout.height=64", "data.prompts_per_step=2", "data.group_size=2", "train.threads=1"]
SIZED = [*SHORT, *(REAL if SIZE == "real" else TINY)]
LORA, ALL = ["model.dtype=bfloat16"], ["model.train=full", "model.dtype=bfloat16", "rollout.guidance=1.0"]
RECIPE = "configs/sd35-pickscore-gpu.yaml"


@dataclass(frozen=True)
class Training:
    """A few steps of a recipe."""

    model: Path
    overrides: Sequence[str]

    def __call__(self) -> dict[str, Any]:
        """Return images a second, seconds of a step and of its parts, and the peak beside the estimate, in GiB."""
        import torch

        from difrl.config.load import read_config
        from difrl.reporting.metrics_file import read_metrics
        from difrl.reporting.terminal import SilentDisplay
        from difrl.training.cost.estimate import estimate
        from difrl.training.run import train

        folder = WORK / "runs" / str(os.getpid())
        path = [f"model.path={self.model}", f"output_dir={folder}"]
        config = read_config(RECIPE, [*SIZED, *path, *self.overrides])
        train(config, display=SilentDisplay())
        peaks = measure_peaks()
        rows = read_metrics(folder)[1:]  # the first step compiles and fills caches
        samples = config.data.prompts_per_step * config.data.group_size
        seconds = {key[5:]: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key.startswith("time/")}
        found = estimate(config)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return {
            "images/s": samples / seconds["rollout"],
            **{f"{name}, s": value for name, value in seconds.items()},
            "step, s": sum(seconds.values()),
            **{name: value / GIB for name, value in peaks.items()},
            "check, GiB": sum(found.memory.values()) / GIB,
            "TFLOP/s of the update": self._speed(found, seconds["update"]),
            **{key: rows[-1][key] for key in ("rollout/mismatch", "grad_norm") if key in rows[-1]},
            "trained, million": found.model.trained / 1e6,
        }

    @staticmethod
    def _speed(found: Any, seconds: float) -> float:
        counts, model = found.evaluations, found.model
        return float((counts.without_gradient * model.forward + counts.gradient * model.training) / seconds / 1e12)


def measure_peaks() -> dict[str, float]:
    """Return the most bytes that were in use: on a GPU by tensors, and with the allocator's cache; on a CPU by the process."""
    import torch

    if DEVICE == "cuda":
        return {"peak, GiB": torch.cuda.max_memory_allocated(), "reserved, GiB": torch.cuda.max_memory_reserved()}
    return {"peak, GiB": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def build() -> dict[str, Any]:
    """Write both models with random weights, made on the device: transformer, autoencoder and both CLIPs, no T5."""
    from tests.published import MODELS, build_folder, build_part

    changes, parts, sizes = FEW_WEIGHTS if SIZE == "tiny" else {}, MODELS["sd35-medium"]["parts"], {}
    for folder, own in ((MODEL, changes), (SMALL, FEWER_WEIGHTS if SIZE == "real" else changes)):
        if folder.exists():
            continue
        place = build_folder("sd35-medium", folder.with_suffix(".part"))
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        (place / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        for part, name in parts.items():
            shutil.rmtree(place / part)
            if part == "text_encoder_3":
                continue
            if folder == SMALL and part != "transformer":
                (place / part).symlink_to((MODEL / part).resolve())
                continue
            module: Any = build_part(name, DEVICE, own.get(part))
            sizes[f"{folder.name}/{part}, million"] = sum(p.numel() for p in module.parameters()) / 1e6
            module.bfloat16().save_pretrained(place / part)
        place.rename(folder)
    return sizes


def compare_batch_shapes() -> dict[str, Any]:
    """Return the largest differences of ℓ, and the largest distances from ratio 1, of 8 samples evaluated in other batches."""
    import torch

    from difrl.config.load import read_config
    from difrl.data.prompts import load_prompts
    from difrl.policies.base import NoiseKey
    from difrl.policies.diffusion.load import load_diffusion_policy
    from difrl.policies.logprob_check import TOLERANCE, deviation

    found: dict[str, Any] = {}
    path = f"model.path={SMALL}"
    size = [item for item in SIZED if not item.startswith(("rollout.batch", "rollout.steps"))]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        own = [*size, path, f"model.dtype={name}", "model.train=lora", "rollout.batch=8", "rollout.steps=6"]
        own += ["train.updates_per_step=1"]
        policy = load_diffusion_policy(read_config("flow_grpo", own), DEVICE)
        prompts = load_prompts("shapes:train")[:8]
        numbers = torch.arange(8)
        rollout = policy.rollout(prompts, numbers, numbers, NoiseKey(0, 0)).to(DEVICE)
        decisions = policy.decisions(rollout, NoiseKey(0, 0))
        recorded = policy.rollout_logprobs(rollout, decisions)
        for together in (1, 2, 4, 8, None):
            again = policy.recompute_logprobs(rollout, decisions, together=together)
            shape = "all decisions" if together is None else f"batch {together}"
            found[f"{name}, {shape}: |Δℓ| / (1 + |ℓ|)"] = deviation(again, recorded, decisions.mask)
            found[f"{name}, {shape}: |ratio − 1|"] = float(((again - recorded).exp() - 1).abs().max())
        found[f"{name}: allowed |Δℓ| / (1 + |ℓ|)"] = TOLERANCE[dtype]
    return found


def run_tests() -> dict[str, Any]:
    """Return the last line of pytest for the tests that need CUDA."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        check=False,
    )
    (OUT / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return {"result": done.stdout.strip().rpartition("\n")[2].strip("= ")}


CASES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "build": build,
    "awm": Training(MODEL, LORA),
    "full": Training(SMALL, ALL),
    "ratio": compare_batch_shapes,
    "tests": run_tests,
    "awm-int8-rollouts": Training(MODEL, [*LORA, "rollout.precision=int8"]),
    "awm-float8-rollouts": Training(MODEL, [*LORA, "rollout.precision=float8_dynamic"]),
    "awm-int8-model": Training(MODEL, [*LORA, "model.quantize=int8"]),
    "awm-xformers": Training(MODEL, [*LORA, "model.attention=xformers"]),
    "awm-compiled": Training(MODEL, [*LORA, "model.compile=true"]),
}
"""Name -> measurement, the most important first: later ones are left out where time is short."""


def main(names: Sequence[str]) -> None:
    """Run cases one after the other, and write what they return."""
    OUT.mkdir(parents=True, exist_ok=True)
    started, results = time.perf_counter(), dict[str, dict[str, Any]]()
    for name in [case for case in CASES if not names or case in names or case == "build"]:
        left = LIMIT - (time.perf_counter() - started)
        results[name] = run_case(name, min(CASE_LIMIT, left)) if left > 20 else {"left out": "no time was left"}
        print(name, json.dumps(results[name], ensure_ascii=False), flush=True)
        (OUT / "gpu.json").write_text(json.dumps({**describe(), "cases": results}, indent=1, ensure_ascii=False))
        (OUT / "gpu.md").write_text(tables(results), encoding="utf-8")


def run_case(name: str, limit: float) -> dict[str, Any]:
    """Run a case in a process of its own. Return its measurements, or the last line of its error."""
    file, begun = OUT / f"{name}.json", time.perf_counter()
    file.unlink(missing_ok=True)
    try:
        command = [sys.executable, "-m", "benchmarks.gpu", "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    if not file.exists():
        return {"failed": (done.stderr.strip() or "no output").rpartition("\n")[2][:300]}
    return {**json.loads(file.read_text(encoding="utf-8")), "seconds in all": time.perf_counter() - begun}


def describe() -> dict[str, Any]:
    """Return the machine and the versions."""
    import torch

    cuda = DEVICE == "cuda" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    versions = {name: version(name) for name in ("difrl", "torch", "diffusers")}
    return {"device": device, "size": SIZE, "commit": _read_commit(), **versions}


def _read_commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as Markdown: one table for trainings, and a list for the others."""
    from benchmarks.common import markdown

    trained = {name: row for name, row in results.items() if "images/s" in row}
    columns = list(dict.fromkeys(key for row in trained.values() for key in row))
    cells = [[name, *(f"{row[c]:.3g}" if c in row else "" for c in columns)] for name, row in trained.items()]
    others = [
        f"* {name}: "
        + "; ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
        )
        for name, row in results.items()
        if name not in trained
    ]
    found = describe()
    head = ", ".join(f"{key} {value}" for key, value in found.items())
    return "\n\n".join([head, markdown(["case", *columns], cells), "\n".join(others)]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        (OUT / f"{sys.argv[2]}.json").write_text(json.dumps(CASES[sys.argv[2]](), ensure_ascii=False), encoding="utf-8")
    else:
        main(sys.argv[1:])
