"""Preference pairs and samples of a language model: read from a file, trained on, and made by `difrl pairs`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.modality import TEXTS
from difrl.data.prompts import Prompt
from difrl.data.recorded_samples import load_recorded_samples
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.inference.preference_pairs import Progress, Solved, make_pairs
from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.cost.estimate import estimate
from difrl.training.rollout_source import PolicyRollouts
from difrl.training.trainer import Trainer
from tests.fakes import Ones
from tests.helpers import write_rows
from tests.recipes import load_training_prompts, text_recipe

PREFERENCE = {
    "likelihood": {"kind": "tokens", "old": "detach"},
    "objective": {"kind": "preference", "beta": 0.5, "decisions": "sum"},
    "advantage": {"std": "none"},
}
ROWS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "99", "metadata": {"number": i}} for i in range(6)]


def config_of(model: Path | str, path: Path, /, **sections: Any) -> RunConfig:
    data = {"train": str(path), "rows": "pairs", "group_size": 2, "evaluation": None, **sections.pop("data", {})}
    return text_recipe(model, data=data, **{**PREFERENCE, **sections})


def trainer_of(model: Path, path: Path, /, **sections: Any) -> Trainer:
    config = config_of(model, path, **sections)
    return Trainer(
        config,
        load_policy(config),
        Scorer.from_rewards({"ones": (Ones(), 1.0)}, {}),
        load_training_prompts(config),
        DistributedContext(),
    )


def silent(name: str) -> None:
    pass


def test_a_pair_is_a_group_of_two_texts(lm: Path, tmp_path: Path) -> None:
    trainer = trainer_of(lm, write_rows(tmp_path, ROWS))
    scored = trainer.source.draw(0, 0, range(4), silent)
    numbers = [p.metadata["number"] for p in scored.rollout.prompts[::2]]
    assert scored.rewards.tolist() == [1, 0] * 4
    assert scored.rollout.texts == tuple(text for i in numbers for text in (str(i + 1), "99"))
    assert scored.rollout.images is None
    tape = scored.rollout.replay_data
    assert tape["mask"].sum(dim=1).tolist() == [2, 3] * 4  # the characters and the end
    read = [row[m].tolist() for row, m in zip(tape["tokens"], tape["mask"], strict=True)]
    assert read[:2] == [[numbers[0] + 3, 1], [11, 11, 1]]  # "0" is token 2, the end 1


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        ({"kind": "preference", "beta": 0.5}, math.log(2)),
        ({"kind": "preference", "beta": 0.5, "divergence": "jensen_shannon"}, math.log(2)),
        ({"kind": "preference", "beta": 0.5, "flip": 0.1}, math.log(2)),
        ({"kind": "preference", "beta": 0.5, "loss": "squared"}, 1.0),
        # KL((σ(1), σ(−1)) ‖ (½, ½)): advantages are ±½ around the mean
        ({"kind": "anchored_preference", "temperature": 1.0}, math.log(2) - 0.5822),
    ],
)
def test_losses_at_the_reference_are_known_and_fall(
    lm: Path, tmp_path: Path, objective: dict[str, Any], loss: float
) -> None:
    path = write_rows(tmp_path, ROWS)
    trainer = trainer_of(lm, path, objective={**objective, "decisions": "sum"}, train={"lr": 5e-4})
    rows = [trainer.step(number) for number in range(4)]
    assert rows[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert rows[3]["loss"] < rows[0]["loss"] - 0.01
    assert rows[3]["preference/accuracy"] > 0.5
    assert rows[3]["nfe"] == 0  # nothing is generated


def test_texts_longer_than_completions_may_be_are_all_told_before_the_first_step(lm: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "rejected": "123456"}, ROWS[2], {**ROWS[3], "chosen": "12345"}]
    path = write_rows(tmp_path, rows)
    with pytest.raises(ModelError) as caught:
        trainer_of(lm, path)
    first, second = str(caught.value).split("\n")
    assert first.startswith(
        f"{path}:2: a completion has 7 tokens, its end included, and generation.max_new_tokens is 5"
    )
    assert second.startswith(f"{path}:4: a completion has 6 tokens")
    with pytest.raises(ModelError, match=re.escape(str(caught.value))):
        estimate(config_of(lm, path))


def test_what_is_rehearsed_is_checked_without_weights(lm: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, ROWS)
    held = {"to": "base", "divergence": "forward_kl", "vocabulary": "sampled", "samples": "rehearsal"}
    broken = [{"prompt": "1+1=", "text": text, "reward": 1.0} for text in ("2", "123456")]
    for rows, error, problem in (
        (broken, ModelError, "samples.jsonl:2: a completion has 7 tokens"),
        ([{"prompt": "1" * 60, "text": "2", "reward": 1.0}], ModelError, "samples.jsonl:1: 60 tokens"),
        ([{"prompt": "1+1=", "reward": 1.0}], ConfigError, 'rehearsal.train: .*samples.jsonl:1: "text" is missing'),
        ([], ConfigError, "rehearsal.train: .*no row in it"),
    ):
        kept = tmp_path / "samples.jsonl"
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(error, match=problem):
            estimate(config_of(lm, path, rehearsal={"train": str(kept)}, anchors=[held]))


def prompts_in(folder: Path) -> dict[str, Any]:
    path = folder / "prompts.txt"
    path.write_text("1+1=\n2+5=\n7+7=\n")
    return {"train": str(path), "prompts_per_step": 2, "group_size": 4, "evaluation": None}


def test_pairs_made_by_a_model_can_be_trained_on(lm: Path, tmp_path: Path) -> None:
    config = text_recipe(lm, data=prompts_in(tmp_path))
    made = make_pairs(config, tmp_path / "made", 3)
    assert made.pairs >= 3
    rows = [json.loads(line) for line in (tmp_path / "made/pairs.jsonl").read_text().splitlines()]
    assert all(row["chosen"].count("1") > row["rejected"].count("1") for row in rows)
    assert not (tmp_path / "made/images").exists()
    assert make_pairs(config, tmp_path / "made", 3) == made
    examples = load_recorded_samples(config_of("nowhere", tmp_path / "made/pairs.jsonl").data, TEXTS)
    assert [e.items for e in examples] == [(row["chosen"], row["rejected"]) for row in rows]
    # A completion cut off at five tokens has no end; read again it has one, as its sixth.
    longer = {"max_new_tokens": 6}
    trainer = trainer_of(lm, tmp_path / "made/pairs.jsonl", generation=longer, data={"prompts_per_step": 3})
    assert trainer.step(0)["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_pairs_of_a_prompt_beyond_the_context_are_refused_with_its_line(lm: Path, tmp_path: Path) -> None:
    data = prompts_in(tmp_path)
    Path(data["train"]).write_text("1+1=\n" + "1" * 60)
    with pytest.raises(ModelError, match=r"prompts\.txt:2: 60 tokens.*context of 64 leaves room for 59"):
        make_pairs(text_recipe(lm, data=data), tmp_path / "made", 1)
    assert not (tmp_path / "made").exists()


def test_solved_groups_are_kept_whole(lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups a step have means of 0.75 and 0.25. All samples of the first are kept, also those of reward 0, and none of
    the second, although the mean of both, and one of its samples, would suffice."""
    drawn = {"1+1=": {"1": 1.0, "2": 0.0, "11": 2.0, "3": 0.0}, "2+5=": {"4": 0.0, "5": 0.0, "1": 1.0, "6": 0.0}}

    def draw(self: PolicyRollouts, step: int, attempt: int, groups: Any, lap: Any) -> ScoredRollout:
        prompts = tuple(prompt for prompt in self.prompts[:2] for _ in range(4))
        assert [p.text for p in prompts[::4]] == list(drawn)
        texts, numbers = tuple(text for group in drawn.values() for text in group), torch.arange(8)
        rewards = torch.tensor([reward for group in drawn.values() for reward in group.values()])
        rollout = Rollout(prompts, numbers // 4, numbers, {}, texts=texts)
        return ScoredRollout(rollout, rewards, torch.ones(8, dtype=torch.bool))

    monkeypatch.setattr(PolicyRollouts, "draw", draw)
    made = make_pairs(text_recipe(lm, data=prompts_in(tmp_path)), tmp_path / "made", 6, selection=Solved(0.4))
    assert made == Progress(pairs=8, ties=2, steps=2)
    rows = [json.loads(line) for line in (tmp_path / "made/samples.jsonl").read_text().splitlines()]
    solved = [("1+1=", text, reward) for text, reward in drawn["1+1="].items()]
    assert [(row["prompt"], row["text"], row["reward"]) for row in rows] == solved * 2


def test_empty_completions_count_in_the_mean_and_are_no_rows(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of four groups. Their means are 1/2 (3/4 without the empty text), 2/3, 1 (without what could not be scored), 1."""
    texts = ("1", "3", "", "1", "11", "", "1", "2", "", "", "", "")
    rewards = torch.tensor([1.0, 0.5, 0, 1, 1, 0, 1, 1, 9, 1, 1, 1])
    groups, valid = torch.arange(4).repeat_interleave(3), torch.tensor([True] * 8 + [False] + [True] * 3)

    def draw(self: PolicyRollouts, step: int, attempt: int, wanted: Any, lap: Any) -> ScoredRollout:
        rollout = Rollout((Prompt("1+1=", {}),) * 12, groups, torch.arange(12), {}, texts=texts)
        return ScoredRollout(rollout, rewards, valid)

    monkeypatch.setattr(PolicyRollouts, "draw", draw)
    config = text_recipe(lm, data=prompts_in(tmp_path))
    assert make_pairs(config, tmp_path / "solved", 4, selection=Solved(0.6)) == Progress(
        pairs=4, ties=2, unscored=0, steps=1
    )
    rows = [json.loads(line) for line in (tmp_path / "solved/samples.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["1", "11", "1", "2"]
    # Pairs are made of texts: the last group has none, the two before it no difference between theirs.
    assert make_pairs(config, tmp_path / "pairs", 1) == Progress(pairs=1, ties=2, unscored=1, steps=1)
    (pair,) = [json.loads(line) for line in (tmp_path / "pairs/pairs.jsonl").read_text().splitlines()]
    assert (pair["chosen"], pair["rejected"]) == ("1", "3")


def test_the_mean_of_a_group_decides_whether_it_is_solved() -> None:
    assert Solved(0.5)(torch.tensor([1.0, 0.0]), "text") == [{"text": 0}, {"text": 1}]
    assert Solved(0.51)(torch.tensor([1.0, 0.0]), "text") == []
