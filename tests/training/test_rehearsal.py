"""Anchors that are measured on samples of a file: their gradient beside the step's own, and settings that conflict with them."""

from __future__ import annotations

import json
import threading
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM

from difrl.core import Likelihoods
from difrl.data.prompts import Prompt, load_prompts
from difrl.data.rollout import Rollout
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.load import load_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.cost.estimate import estimate
from difrl.training.trainer import Trainer
from tests.fakes import Brightness, Ones, in_threads
from tests.helpers import first_gradient, perturb, write_rows
from tests.recipes import recipe, text_recipe

PROMPTS = [Prompt(text, {}) for text in ("1+", "2+5", "7=", "4+4=", "5+")]
TEXTS = {"1+1=": "2", "2+5=": "77", "7+7=": "14", "3+4=": "345"}
ANCHOR = {
    "to": "base",
    "divergence": "jensen_shannon",
    "vocabulary": "sampled",
    "samples": "rehearsal",
    "coefficient": 0.7,
}

LOADING = threading.Lock()
"""Held while a model loads: transformers patches its classes meanwhile, and two threads could leave them patched."""


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"prompt": prompt, "text": text, "reward": 1} for prompt, text in TEXTS.items()]
    return str(write_rows(tmp_path, rows))


def trainer_of(lm: Path, file: str | None, processes: DistributedContext | None = None, /, **sections: Any) -> Trainer:
    rehearsal = {} if file is None else {"rehearsal": {"train": file, "prompts_per_step": 4}, "anchors": [ANCHOR]}
    train = {"max_grad_norm": 1e9, "lr": 1e-3, **sections.pop("train", {})}
    config = text_recipe(lm, train=train, **{**rehearsal, **sections})
    with LOADING:
        policy = load_policy(config)
    perturb(policy.parameters, 0.1)
    return Trainer(
        config, policy, Scorer.from_rewards({"ones": (Ones(), 1.0)}, {}), PROMPTS, processes or DistributedContext()
    )


def divergence(lm: Path, policy: Any) -> Tensor:
    """Return the mean over the file's 12 tokens of u log u − (1 + u) log((1 + u) / 2), u = θ / base, a text at a time."""
    assert isinstance(policy, LanguagePolicy)
    base, terms = AutoModelForCausalLM.from_pretrained(lm), []
    for prompt, text in TEXTS.items():
        ids = policy.tokenizer.tokenizer(prompt)["input_ids"]
        whole = torch.tensor([[*ids, *policy.tokenizer.tokenizer(text)["input_ids"], 1]])
        chosen = whole[0, len(ids) :, None]

        def logp(model: Any, whole: Tensor = whole, chosen: Tensor = chosen, start: int = len(ids)) -> Tensor:
            return model(whole).logits[0, start - 1 : -1].log_softmax(dim=1).gather(1, chosen)[:, 0]

        u = (logp(policy.network.model) - logp(base).detach()).exp()
        terms.append(u * u.log() - (1 + u) * ((1 + u) / 2).log())
    assert len(torch.cat(terms)) == 12
    return torch.cat(terms).mean()


def test_the_gradient_is_the_steps_own_and_that_of_the_samples_of_the_file(lm: Path, file: str) -> None:
    alone, rehearsed = trainer_of(lm, None), trainer_of(lm, file)
    expected = divergence(lm, rehearsed.policy)
    parameters = list(rehearsed.parameters)
    added = torch.autograd.grad(expected, parameters, materialize_grads=True)
    own, found = first_gradient(alone), first_gradient(rehearsed)
    wanted = own + 0.7 * torch.cat([g.flatten() for g in added])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()))
    assert (found - own).abs().max() > 1e-3


def test_metrics_are_of_the_samples_of_the_file(lm: Path, file: str) -> None:
    alone, rehearsed = trainer_of(lm, None), trainer_of(lm, file)
    expected = float(divergence(lm, rehearsed.policy).detach())
    one, other = alone.step(0), rehearsed.step(0)
    assert other["kl/base-rehearsal"] == pytest.approx(expected, rel=1e-4)
    assert other["coefficient/base-rehearsal"] == pytest.approx(0.7)
    assert other["loss"] == pytest.approx(one["loss"] + 0.7 * expected, abs=1e-5)
    assert other["reward/mean"] == one["reward/mean"]


def test_micro_batches_and_processes_do_not_matter(lm: Path, file: str) -> None:
    expected = first_gradient(trainer_of(lm, file, train={"micro_batch": 1000}))
    close = {"rtol": 1e-3, "atol": 2e-5 * float(expected.abs().max())}
    torch.testing.assert_close(first_gradient(trainer_of(lm, file, train={"micro_batch": 5})), expected, **close)
    for found in in_threads(2, lambda processes: first_gradient(trainer_of(lm, file, processes))):
        torch.testing.assert_close(found, expected, **close)


def test_each_update_rehearses_its_share(lm: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two updates trains on its samples and rehearses its half of the file."""
    trainer = trainer_of(lm, file, train={"updates_per_step": 2})
    likelihoods, seen = trainer.policy.likelihoods, list[list[str]]()

    def recording(rollout: Rollout, *more: Any) -> Likelihoods:
        seen.append([prompt.text for prompt in rollout.prompts])
        return likelihoods(rollout, *more)

    monkeypatch.setattr(trainer.policy, "likelihoods", recording)
    for number in range(2):
        seen.clear()
        trainer.step(number)
        rehearsed = [set(texts) <= set(TEXTS) for texts in seen]  # no prompt of a step is in the file
        assert [which for which, _ in groupby(rehearsed)] == [False, True, False, True]
        first, second = (texts for texts, which in zip(seen, rehearsed, strict=True) if which)
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"rehearsal": None}, "add rehearsal: {train: FILE}"),
        ({"anchors": []}, "no anchor is measured on it"),
        ({"anchors": [{**ANCHOR, "divergence": "k3", "vocabulary": "full"}]}, "k3 estimates a KL from samples of θ"),
        (
            {"anchors": [{**ANCHOR, "place": "decision", "divergence": "k1", "vocabulary": "full"}]},
            "neither reward nor",
        ),
        (
            {"anchors": [{**ANCHOR, "coefficient": {"kind": "reward_adaptive", "value": 0.1}}]},
            "which rehearsed samples do not have",
        ),
        (
            {"train": {"updates_per_step": 2}, "rehearsal": {"train": "x.jsonl", "prompts_per_step": 3}},
            "set a multiple",
        ),
    ],
)
def test_what_does_not_go_with_a_rehearsal_is_refused(sections: dict[str, Any], problem: str) -> None:
    rehearsal = {"train": "x.jsonl", "prompts_per_step": 4}
    with pytest.raises(ValueError, match=problem):
        text_recipe("nowhere", **{"rehearsal": rehearsal, "anchors": [ANCHOR], **sections})


def test_a_prompt_beyond_the_context_is_named_by_its_line(lm: Path, tmp_path: Path) -> None:
    """The context has 64 tokens, of which a completion may take 5."""
    path = tmp_path / "samples.jsonl"
    rows = [{"prompt": prompt, "text": "2", "reward": 1} for prompt in ("1+1=", "1" * 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError, match=r"samples\.jsonl:2: 60 tokens.*context of 64 leaves room for 59"):
        trainer_of(lm, str(path))


def test_images_are_rehearsed_too(sd3: Path, tmp_path: Path) -> None:
    """A velocity anchor on images of a file has no gradient at the base, and takes the planned number of evaluations."""
    Image.new("RGB", (8, 8), (200, 40, 40)).save(tmp_path / "red.png")
    said = {"prompt": "a red square", "image": "red.png", "reward": 1}
    (tmp_path / "samples.jsonl").write_text(json.dumps(said) + "\n")
    config = recipe(
        sd3,
        anchors=[{"to": "base", "samples": "rehearsal", "coefficient": 0.5}],
        rehearsal={"train": str(tmp_path / "samples.jsonl"), "prompts_per_step": 1},
    )
    policy = load_policy(config)
    assert isinstance(policy, DiffusionPolicy)
    prompts = load_prompts("shapes:train")[:4]
    trainer = Trainer(
        config, policy, Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {}), prompts, DistributedContext()
    )
    row = trainer.step(0)
    assert row["kl/base-rehearsal"] == pytest.approx(0, abs=1e-8)
    assert row["nfe"] == estimate(config).evaluations.step
    assert trainer.step(1)["kl/base-rehearsal"] > 0
