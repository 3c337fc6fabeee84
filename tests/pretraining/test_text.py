"""Pretraining of texts: the tokenizer, the corpus, its loss, and killed runs that end like whole ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from difrl.config.yaml_source import ConfigError
from difrl.pretraining import tiny_lm
from difrl.pretraining.pretrain import pretrain
from difrl.pretraining.text import (
    IGNORE_INDEX,
    Corpus,
    DecoderConfig,
    TextConfig,
    pretrain_text,
    solution_loss,
)
from difrl.runtime.paths import asset
from difrl.tasks import arithmetic
from difrl.tasks.arithmetic import Problem


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_lm.build_tokenizer()


def test_a_token_a_character_and_back(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert found("47+38=").input_ids == [1, *(4 + arithmetic.CHARACTERS.index(c) for c in "47+38=")]
        assert found("x 1", add_special_tokens=False).input_ids == [3, 3, 5]  # other characters are <unk>
        ids = found("15;8;=85", add_special_tokens=False).input_ids
        assert found.decode([*ids, found.eos_token_id], skip_special_tokens=True) == "15;8;=85"
        batch = found(["1+2=", "47+38="], return_tensors="pt", padding=True)
        assert batch.input_ids[0].tolist()[:3] == [0, 0, 1]  # on the left
        assert batch.attention_mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1]
        assert found.model_max_length == tiny_lm.CONTEXT
        assert found.chat_template is None


def test_longest_text_fits_the_context() -> None:
    longest = max(len(p.text) + len(p.worked) for p in arithmetic.list_problems())
    assert longest + 2 <= tiny_lm.CONTEXT  # <bos> and <eos>


SOLUTIONS = [(0, 0, "47+38=", "85"), (0, 1, "47+38=", "75"), (0, 2, "47+38=", "15;8;=85"), (1, 2, "2-1=", "1;0;=1")]


def decoder(**more: Any) -> DecoderConfig:
    return DecoderConfig.model_validate({"steps": 4, "batch": 64, "lr": 1e-3, "worked": 0.5, "careless": 0.5, **more})


def test_corpus_holds_every_solution_and_labels_it_alone(tokenizer: Any) -> None:
    corpus = Corpus.build([Problem(47, "+", 38), Problem(2, "-", 1)], tokenizer)
    assert corpus.tokens.shape == corpus.labels.shape == (2, 3, 1 + 6 + 8 + 1)
    for row, which, text, solution in SOLUTIONS:
        tokens, labels = corpus.tokens[row, which], corpus.labels[row, which]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text + solution
        assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == f"{solution}<eos>"
        assert (labels == torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, tokens)).all()
    tokens, labels = corpus.batch(decoder(worked=0.0), torch.Generator().manual_seed(0))
    assert tokens.shape == labels.shape == (64, 1 + 6 + 2 + 1)  # answers at once; no column is padding alone


@pytest.mark.parametrize(("worked", "careless"), [(0.0, 0.0), (0.3, 0.8), (1.0, 0.5)])
def test_shares_of_solutions(tokenizer: Any, worked: float, careless: float) -> None:
    """Shares agree within four standard errors."""
    corpus = Corpus.build([Problem(47, "+", 38)], tokenizer)
    config = decoder(batch=2000, worked=worked, careless=careless)
    tokens, _ = corpus.batch(config, torch.Generator().manual_seed(0))
    drawn = Counter(text.partition("=")[2] for text in tokenizer.batch_decode(tokens, skip_special_tokens=True))
    shares = {"15;8;=85": worked, "75": (1 - worked) * careless, "85": (1 - worked) * (1 - careless)}
    assert drawn.total() == 2000
    for solution, share in shares.items():
        assert abs(drawn[solution] / 2000 - share) <= 4 * (share * (1 - share) / 2000) ** 0.5


def test_loss_is_transformers_own(tokenizer: Any) -> None:
    model = tiny_lm.build_model(tokenizer, 0)
    tokens, labels = Corpus.build(arithmetic.list_problems()[:50], tokenizer).batch(
        decoder(), torch.Generator().manual_seed(0)
    )
    found = model(input_ids=tokens, labels=labels)
    torch.testing.assert_close(solution_loss(found.logits, labels), found.loss, rtol=1e-6, atol=0)


def test_no_evaluation_problem_is_in_the_corpus() -> None:
    """pretrain_text takes problems("train"), of which tests/tasks/test_arithmetic.py shows that none is held out."""
    assert not any(p.held_out for p in arithmetic.list_problems("train"))


def config(folder: Path, steps: int) -> TextConfig:
    stage = decoder(steps=steps, batch=4, evaluate_problems=0, checkpoint_every=2)
    return TextConfig(architecture="tiny-lm", output=folder / "out", work=folder / "work", decoder=stage)


def test_killed_and_given_again_ends_with_the_same_model(tmp_path: Path) -> None:
    pretrain_text(config(tmp_path / "whole", 4))
    pretrain_text(config(tmp_path / "parts", 2))  # its checkpoint is the one a run killed after two steps leaves behind
    pretrain_text(config(tmp_path / "parts", 4))
    whole, parts = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()} for name in ("whole", "parts")
    ]
    assert whole == parts


def test_shipped_model_is_what_transformers_loads(tokenizer: Any) -> None:
    folder = asset("tiny-lm")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.num_parameters() == tiny_lm.build_model(tokenizer, 0).num_parameters()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3e6
    texts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.json"))
    assert "_name_or_path" not in texts
    assert "/" not in texts, "no path of the machine that made it"


def test_an_architecture_that_does_not_exist_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text("architecture: tiny-ml\n")
    with pytest.raises(ConfigError, match=r"tiny\.yaml: architecture is 'tiny-ml', expected one of .*tiny-lm"):
        pretrain(file)
    file.write_text(
        "architecture: tiny-lm\noutput: a\nwork: b\ndecoder: {steps: 1, batch: 1, lr: 1, careless: 1, worked: 2}\n"
    )
    with pytest.raises(ConfigError, match=r"tiny\.yaml:4: decoder\.worked: expected at most 1, found 2"):
        pretrain(file)
