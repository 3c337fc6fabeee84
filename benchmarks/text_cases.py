"""One measurement of benchmarks/text.py as JSON, in a separate process, so that peak memory is that of this case.

    python benchmarks/text_cases.py FOLDER PART WHO PROMPTS LENGTH NEW REPEATS

WHO is `ours` for the work of a difrl run: draw by the engine, score by the policy, and a backward pass through likelihoods and
the clipped objective. It is `bare` for the same work in plain calls of transformers: `generate` with do_sample, a forward pass,
and a forward and backward pass of the cross-entropy of the completions.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from difrl.config import RunConfig
from difrl.core import Clipped, weighted_mean
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import NoiseKey
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.policy import LanguagePolicy

Work = Callable[[], int]
"""Function that does the work once and returns the number of tokens of completions."""


@dataclass(frozen=True)
class Shape:
    """Amount of text."""

    prompts: int
    length: int
    """Number of tokens of a prompt."""
    new: int
    """Number of tokens of a completion."""


class Given:
    """A model folder, prompts of its tokens, and completions to score."""

    def __init__(self, folder: Path, shape: Shape, part: str) -> None:
        self.folder, self.shape = folder, shape
        self.cache = "static" if part.endswith("static") else "dynamic"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        plain = sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids))
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(len(plain), (shape.prompts, shape.length + shape.new), generator=generator)
        prompts, self.completions = torch.tensor(plain)[places].split([shape.length, shape.new], dim=1)
        texts = self.tokenizer.batch_decode(prompts)
        self.prompts = tuple(Prompt(text, {}) for text in texts)
        self.ids = torch.tensor(self.tokenizer(texts)["input_ids"])
        """Token ids of the prompts, including those that the tokenizer adds."""

    def bare(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def policy(self) -> LanguagePolicy:
        """Load a policy whose completions end at the pad token, which a trained model does not draw, so they have full length."""
        pad = self.tokenizer.pad_token
        config = {
            "model": {"path": str(self.folder), "train": "full"},
            "data": {"train": "-"},
            "rewards": [{"import": "none:None"}],
            "generation": {
                "max_new_tokens": self.shape.new,
                "cache": self.cache,
                "eos": [pad],
                "pad": pad,
                "chat": False,
            },
            "likelihood": {"kind": "tokens"},
            "objective": {"kind": "clipped"},
            "rollout": {"batch": self.shape.prompts},
        }
        return load_language_policy(RunConfig.model_validate(config))

    @property
    def rollout(self) -> Rollout:
        """Return the completions as a rollout."""
        mask, rows = torch.ones(self.shape.prompts, self.shape.new, dtype=torch.bool), torch.arange(self.shape.prompts)
        replay_data = {"tokens": self.completions, "mask": mask, "log_prob": torch.zeros(mask.shape)}
        return Rollout(self.prompts, rows, rows, replay_data)

    @property
    def count(self) -> int:
        return self.shape.prompts * self.shape.new


def ours_generation(given: Given) -> Work:
    policy, prompts, rows = given.policy(), given.prompts, torch.arange(given.shape.prompts)
    return lambda: int(policy.rollout(prompts, rows, rows, NoiseKey(0, 0)).replay_data["mask"].sum())


def bare_generation(given: Given) -> Work:
    model, pad = given.bare(), given.tokenizer.pad_token_id
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "eos_token_id": pad, "pad_token_id": pad}

    def work() -> int:
        found = model.generate(
            given.ids,
            attention_mask=torch.ones_like(given.ids),
            max_new_tokens=given.shape.new,
            cache_implementation=given.cache,
            disable_compile=True,
            **settings,
        )
        return int((found[:, given.ids.shape[1] :] != pad).sum())

    return work


def ours_scoring(given: Given) -> Work:
    policy = given.policy()
    rollout = given.rollout

    def work() -> int:
        policy.recompute_logprobs(rollout, policy.decisions(rollout, NoiseKey(0, 0)))
        return given.count

    return work


def bare_scoring(given: Given) -> Work:
    model = given.bare()

    @torch.no_grad()
    def work() -> int:
        _cross_entropy(model, given)
        return given.count

    return work


def ours_update(given: Given) -> Work:
    policy = given.policy()
    rollout = given.rollout
    advantages = torch.ones(given.shape.prompts)

    def work() -> int:
        lik = policy.likelihoods(rollout, policy.decisions(rollout, NoiseKey(0, 0)))
        loss, _ = Clipped()(lik, advantages, rollout.groups, None)
        weighted_mean(loss, lik.mask, given.count).backward()
        policy.network.model.zero_grad()
        return given.count

    return work


def bare_update(given: Given) -> Work:
    model = given.bare()

    def work() -> int:
        _cross_entropy(model, given).backward()
        model.zero_grad()
        return given.count

    return work


def _cross_entropy(model: torch.nn.Module, given: Given) -> torch.Tensor:
    tokens = torch.cat([given.ids, given.completions], dim=1)
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    start = given.ids.shape[1]
    return F.cross_entropy(logits[:, start - 1 : -1].flatten(0, 1), given.completions.flatten())


CASES: Mapping[tuple[str, str], Callable[[Given], Work]] = {
    ("generation, dynamic", "ours"): ours_generation,
    ("generation, dynamic", "bare"): bare_generation,
    ("generation, static", "ours"): ours_generation,
    ("generation, static", "bare"): bare_generation,
    ("scoring", "ours"): ours_scoring,
    ("scoring", "bare"): bare_scoring,
    ("update", "ours"): ours_update,
    ("update", "bare"): bare_update,
}


def measure(work: Work, repeats: int) -> dict[str, object]:
    """Measure processor seconds a token, several times after a warm-up, and the peak memory.

    Processor time of the single thread depends less on other work on the machine than wall time.
    """
    work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        tokens = work()
        seconds.append((time.process_time() - start) / tokens)
    return {"seconds": seconds, "mib": peak() / 2**20}


def peak() -> float:
    """Return the peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss includes the parent process; VmHWM does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    folder, part, who, *numbers = sys.argv[1:]
    prompts, length, new, repeats = map(int, numbers)
    torch.set_num_threads(1)
    given = Given(Path(folder), Shape(prompts, length, new), part)
    print(json.dumps(measure(CASES[part, who](given), repeats)))


if __name__ == "__main__":
    main()
