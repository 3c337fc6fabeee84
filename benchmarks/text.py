"""Cost of difrl compared with plain calls of a language model: tokens a second and peak memory, one CPU thread.

    python benchmarks/text.py                              ten minutes on a quiet core; writes docs/benchmarks/text.md

Generation (with either cache), scoring and update of completions each run in a separate process (text_cases.py), on the shipped
model and on a model of a hundred million random weights that is built here and not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from text_cases import CASES, Shape
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from difrl.policies.model_paths import resolve

PARTS = tuple(dict.fromkeys(part for part, _ in CASES))
LARGE = "100M"


@dataclass(frozen=True)
class Measured:
    """Processor seconds a token of every repeat, and the peak memory of the process in MiB."""

    seconds: tuple[float, ...]
    mib: float


def build_large(folder: Path, vocabulary: int = 32_000) -> Path:
    """Write a Llama of 99 million random weights, and a tokenizer of one word a token that AutoTokenizer loads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<eos>", *map(str, range(vocabulary - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def pooled(rounds: Sequence[Measured]) -> Measured:
    """Return the measurements of several processes of the same case together."""
    return Measured(tuple(s for one in rounds for s in one.seconds), median(one.mib for one in rounds))


def measured(folder: Path, part: str, who: str, shape: Shape, repeats: int) -> Measured:
    """Measure one case in a new process of one thread."""
    numbers = map(str, (shape.prompts, shape.length, shape.new, repeats))
    command = [sys.executable, str(Path(__file__).with_name("text_cases.py")), str(folder), part, who, *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    return Measured(tuple(found["seconds"]), found["mib"])


def row(part: str, ours: Measured, bare: Measured) -> list[str]:
    """Return a row of the table."""
    slower = median(ours.seconds) / median(bare.seconds), min(ours.seconds) / min(bare.seconds)
    rates = [f"{1 / median(m.seconds):,.0f} ({1 / min(m.seconds):,.0f})" for m in (ours, bare)]
    return [part, *rates, f"{slower[0]:.2f} ({slower[1]:.2f})", f"{ours.mib:,.0f}", f"{bare.mib:,.0f}"]


HEADER = ("", "ours, tokens/s", "bare, tokens/s", "time, ours / bare", "ours, peak MiB", "bare, peak MiB")


def page(tables: Mapping[str, list[list[str]]], note: str) -> str:
    """Return docs/benchmarks/text.md."""
    from common import markdown  # it imports matplotlib, which no case should have in memory

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    text = f"""# Cost of difrl compared with plain calls of a language model

`python benchmarks/text.py` writes this page. {platform.machine()}, {os.cpu_count()} cores of which one thread was used,
float32, {versions}. {note}

Tokens of completions a second of processor time (of one thread, so other work on the machine matters little): the median of the
repeats, with the fastest in brackets, from alternating processes of difrl (ours) and of plain calls (bare). Ours / bare is the
ratio of times, above 1 if ours is slower. Ours draws with noise keyed by sample and token and records ℓ of every token; bare
`generate` (do_sample, whole distribution) does neither. Scoring is ℓ of given completions; bare, a forward pass and the
cross-entropy. An update is likelihoods, the clipped objective and a backward pass through all weights; bare, the cross-entropy
of the completions and its backward pass; both without optimizer. Peak memory is that of the process, including libraries and
the model.
"""
    for title, rows in tables.items():
        text += f"\n## {title}\n\n{markdown(HEADER, rows)}\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", default="tiny-lm", help="folder or shipped name of the small model")
    parser.add_argument(
        "--repeats", type=int, default=3, help="repeats of a case in its process; ten times as many for the small model"
    )
    parser.add_argument("--rounds", type=int, default=2, help="processes of each case, alternating ours and bare")
    parser.add_argument("--note", default="", help="sentence on the circumstances, such as a shared machine")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/text.md"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {args.small: Path(resolve(args.small)), LARGE: build_large(Path(scratch))}
        shapes = {args.small: Shape(64, 8, 16), LARGE: Shape(8, 16, 32)}
        again = {args.small: 10, LARGE: 1}
        tables: dict[str, list[list[str]]] = {}
        for name, folder in folders.items():
            shape = shapes[name]
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
            title = (
                f"{name}: {weights / 1e6:.1f} million weights, {shape.prompts} × ({shape.length} + {shape.new}) tokens"
            )
            tables[title] = []
            for part in PARTS:
                # Alternating, so that a temporary slowdown of the machine affects both.
                rounds = [
                    [measured(folder, part, who, shape, args.repeats * again[name]) for who in ("ours", "bare")]
                    for _ in range(args.rounds)
                ]
                tables[title].append(row(part, *map(pooled, zip(*rounds, strict=True))))
                print(title, *tables[title][-1], sep=" | ", flush=True)
    args.out.write_text(page(tables, args.note))


if __name__ == "__main__":
    main()
