"""Samples of a file: their choice, the policy's data for them, and training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import read_images
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.rollout_source import DatasetRollouts, number_samples
from difrl.training.trainer import Trainer
from tests.fakes import Brightness, in_threads
from tests.helpers import first_gradient, write_rows
from tests.recipes import load_training_prompts, recipe

PAIRS = {"rows": "pairs", "group_size": 2, "prompts_per_step": 4}


def picture(folder: Path, name: str, level: int, size: tuple[int, int] = (8, 8)) -> str:
    """Return an image of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 255 - level, 40)).save(folder / name)
    return name


def pair_file(folder: Path, count: int = 6) -> Path:
    rows = [
        {
            "prompt": f"prompt {i}",
            "chosen": picture(folder, f"{i}-chosen.png", 20 + 30 * i),
            "rejected": picture(folder, f"{i}-rejected.png", 5 + 30 * i),
            "metadata": {"number": i},
        }
        for i in range(count)
    ]
    return write_rows(folder, rows)


def sample_file(folder: Path, rewards: dict[str, list[float]]) -> Path:
    rows = [
        {"prompt": prompt, "image": picture(folder, f"{prompt}-{n}.png", 10 * n), "reward": reward}
        for prompt, values in rewards.items()
        for n, reward in enumerate(values)
    ]
    return write_rows(folder, rows[::2] + rows[1::2])


def config_of(model: Path | str, path: Path, /, **sections: Any) -> RunConfig:
    data = {**PAIRS, "train": str(path), **sections.pop("data", {})}
    return recipe(model, data=data, likelihood={"kind": "forward", "decisions": 3, "share": ["t", "noise"]}, **sections)


def trainer_of(model: Path, path: Path, /, **sections: Any) -> Trainer:
    config = config_of(model, path, **sections)
    return trained(config, load_diffusion_policy(config), DistributedContext())


def trained(config: RunConfig, policy: DiffusionPolicy, processes: DistributedContext) -> Trainer:
    scorer = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {})
    return Trainer(config, policy, scorer, load_training_prompts(config), processes)


def policy_of(trainer: Trainer) -> DiffusionPolicy:
    assert isinstance(trainer.policy, DiffusionPolicy)
    return trainer.policy


def silent(name: str) -> None:
    pass


def test_group_and_sample_numbers_by_hand() -> None:
    ids, samples = number_samples([1, 3], 2, 4)
    assert (ids.tolist(), samples.tolist()) == ([1, 1, 3, 3], [10, 11, 14, 15])


def test_a_pair_is_a_group_with_rewards_1_and_0(sd3: Path, tmp_path: Path) -> None:
    trainer = trainer_of(sd3, pair_file(tmp_path))
    scored = trainer.source.draw(0, 0, range(4), silent)
    assert scored.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert scored.rewards.tolist() == [1, 0] * 4
    assert scored.valid.all()
    numbers = [p.metadata["number"] for p in scored.rollout.prompts]
    assert numbers[::2] == numbers[1::2]
    assert len(set(numbers)) == 4
    names = [name for i in numbers[::2] for name in (f"{i}-chosen.png", f"{i}-rejected.png")]
    assert scored.rollout.images is not None
    assert torch.equal(scored.rollout.images, read_images([tmp_path / name for name in names]))
    latents = policy_of(trainer).family.encode_images(scored.rollout.images)
    torch.testing.assert_close(
        scored.rollout.replay_data["latents"], latents, atol=1e-6, rtol=1e-5
    )  # batches of another shape


def test_every_pair_is_taken_once_an_epoch_in_an_order_of_its_own(sd3: Path, tmp_path: Path) -> None:
    trainer = trainer_of(sd3, pair_file(tmp_path, 8))

    def numbers(step: int) -> list[int]:
        scored = trainer.source.draw(step, 0, range(4), silent)
        return [p.metadata["number"] for p in scored.rollout.prompts[::2]]

    assert sorted(numbers(0) + numbers(1)) == list(range(8))
    assert numbers(0) + numbers(1) != numbers(2) + numbers(3)
    assert numbers(1) == numbers(1)


def test_advantages_tell_the_chosen_from_the_rejected(sd3: Path, tmp_path: Path) -> None:
    trainer = trainer_of(sd3, pair_file(tmp_path))
    scored = trainer.source.draw(0, 0, range(4), silent)
    assert (trainer._estimate_advantages(scored, {}).sign() == torch.tensor([1.0, -1.0] * 4)).all()


def test_the_trainer_learns_and_the_check_of_its_first_update_passes(sd3: Path, tmp_path: Path) -> None:
    trainer = trainer_of(sd3, pair_file(tmp_path))
    before = [p.detach().clone() for p in trainer.parameters]
    row = trainer.step(0)
    assert row["reward/mean"] == 0.5
    assert row["nfe"] == 8 * 3  # no sampler: only the decisions
    assert any(not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_micro_batches_caches_and_processes_do_not_matter(sd3: Path, tmp_path: Path) -> None:
    path, unclipped = pair_file(tmp_path), {"max_grad_norm": 1e9}
    expected = first_gradient(trainer_of(sd3, path, train={"micro_batch": 1000, **unclipped}))
    close = {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
    small = trainer_of(sd3, path, train={"micro_batch": 2, **unclipped}, data={"cache": 0}, rollout={"batch": 1})
    torch.testing.assert_close(first_gradient(small), expected, **close)

    config = config_of(sd3, path, train=unclipped)
    policies = [load_diffusion_policy(config) for _ in range(2)]

    def work(processes: DistributedContext) -> Tensor:
        return first_gradient(trained(config, policies[processes.rank], processes))

    for found in in_threads(2, work):
        torch.testing.assert_close(found, expected, **close)


def test_latents_are_kept_for_as_many_images_as_asked(sd3: Path, tmp_path: Path) -> None:
    for cache, again in ((8, 0), (7, 1), (0, 8)):
        trainer = trainer_of(sd3, pair_file(tmp_path, 4), data={"cache": cache})
        encoded: list[Tensor] = []
        family = policy_of(trainer).family
        encode = family.encode_images
        first = trainer.source.draw(0, 0, range(4), silent)
        family.encode_images = lambda images: encoded.append(images) or encode(images)  # type: ignore[method-assign, func-returns-value]  # noqa: B023
        second = trainer.source.draw(0, 0, range(4), silent)
        assert len(encoded) == again
        assert torch.equal(first.rollout.replay_data["latents"], second.rollout.replay_data["latents"])


def test_samples_of_one_prompt_are_a_group(sd3: Path, tmp_path: Path) -> None:
    path = sample_file(tmp_path, {"a": [0.5, 1.0, 0.0], "b": [2.0, 3.0], "c": [0.1, 0.2]})
    trainer = trainer_of(sd3, path, data={"rows": "samples", "group_size": 2, "prompts_per_step": 2})
    assert isinstance(trainer.source, DatasetRollouts)
    assert {e.prompt.text: e.rewards for e in trainer.source.recorded} == {
        "a": (0.5, 0.0, 1.0),  # in the order of the file
        "b": (3.0, 2.0),
        "c": (0.2, 0.1),
    }
    seen = set()
    for step in range(30):
        scored = trainer.source.draw(step, 0, range(2), silent)
        for i in (0, 2):
            prompt = scored.rollout.prompts[i].text
            assert scored.rollout.prompts[i + 1].text == prompt
            seen.add((prompt, *scored.rewards[i : i + 2].tolist()))
    # Two of the three images of "a", each of the three ways; all images of the others.
    assert len([row for row in seen if row[0] == "a"]) == 3
    assert len([row for row in seen if row[0] == "b"]) == 1


def test_images_of_another_size_than_the_models(sd3: Path, tmp_path: Path) -> None:
    for level, name in enumerate(("a.png", "b.png")):
        picture(tmp_path, name, level, (16, 12))
    path = write_rows(tmp_path, [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}])
    with pytest.raises(ModelError, match=r"have 16 × 12 pixels, and the model is sampled at 8 × 8.*rollout.width: 16"):
        trainer_of(sd3, path)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"likelihood": {"kind": "reverse"}, "rollout": {"kernel": "cps", "noise_level": 0.5}}, "likelihood.kind"),
        ({"collect": {"max_draws": 2}}, "collect.max_draws"),
        ({"advantage": {"normalise": "each"}}, "advantage.normalise"),
        ({"data": {**PAIRS, "train": "x.jsonl", "group_size": 4}}, "data.group_size"),
        ({"rollout": {"kernel": "cps", "noise_level": 0.5, "branch": {}}}, "rollout.branch"),
    ],
)
def test_what_a_file_cannot_give_is_refused(sections: dict[str, Any], key: str) -> None:
    with pytest.raises((ValueError, ConfigError)) as error:
        recipe("nowhere", **{"data": {**PAIRS, "train": "x.jsonl"}, **sections})
    assert key in str(error.value)
