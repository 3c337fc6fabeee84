"""Greedy accuracy, accuracy of samples and pass@k of a language model on held-out problems: its room for improvement.

    python benchmarks/passk.py                          tiny-lm on arithmetic:eval, a minute or two on one CPU thread
    python benchmarks/passk.py runs/NAME/model --problems 300 --samples 32 --k 1 8 32

The model is any folder or hub id that transformers loads, the problems are any set whose metadata hold an answer. Standard errors
are over problems. Chat templates are not applied: the text of a problem is the prompt.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import markdown
from transformers import AutoModelForCausalLM, AutoTokenizer

from difrl.data.prompts import load_prompts
from difrl.pretraining.solve_rate import SolveRateSettings, check_answers, generate_completions, summarise_accuracy
from difrl.runtime.paths import asset, assets
from samplers.noise import stable_seed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-lm", help="a shipped model, a folder, or a hub id")
    parser.add_argument("--prompts", default="arithmetic:eval", help="a prompt file or a built-in set")
    parser.add_argument("--problems", type=int, default=512, help="number of problems, drawn with a fixed seed")
    parser.add_argument("--samples", type=int, default=16, help="samples of a problem")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    folder = asset(asked.model) if asked.model in assets() else asked.model
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    everything = load_prompts(asked.prompts)
    generator = torch.Generator().manual_seed(stable_seed("passk"))
    chosen = [everything[i] for i in torch.randperm(len(everything), generator=generator)[: asked.problems].tolist()]
    prompts, metadata = [p.text for p in chosen], [p.metadata for p in chosen]
    started = time.monotonic()
    greedy, sampled = (
        check_answers(
            generate_completions(
                model, tokenizer, prompts, count, SolveRateSettings(asked.max_new_tokens, temperature, seed=asked.seed)
            ),
            metadata,
        )
        for count, temperature in ((1, 0.0), (asked.samples, asked.temperature))
    )
    found = summarise_accuracy(greedy, sampled, asked.k)
    drawn = f"{asked.samples} samples at temperature {asked.temperature:g}, seed {asked.seed}"
    print(f"{asked.model}, {len(chosen)} problems of {asked.prompts}, {drawn}, {time.monotonic() - started:.0f} s\n")
    print(markdown(["", *found], [["share right", *(f"{mean:.3f} ± {error:.3f}" for mean, error in found.values())]]))


if __name__ == "__main__":
    main()
