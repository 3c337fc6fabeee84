"""The enumerable language model: a table in transformers' own format, the same with every cache and padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from difrl.tasks.exact import enumerable
from difrl.tasks.exact.enumerable import (
    COMPLETIONS,
    FIRST_LETTER_ID,
    LETTERS,
    NODES,
    EnumerableTask,
    TableReward,
    table_rows,
)
from rewards import score

TASK = EnumerableTask(seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TASK.save(tmp_path_factory.mktemp("enumerable"))


def test_nodes_by_hand() -> None:
    """Letters v after node n lead to 4 n + 1 + v; padding has no row; after the third letter there is no decision."""
    pad, end, ask, (a, b, c, d) = 0, 1, 2, range(FIRST_LETTER_ID, FIRST_LETTER_ID + 4)
    found = table_rows(torch.tensor([[pad, ask, b, c, d], [ask, ask, d, a, end]]))
    assert found.tolist() == [[-1, 0, 2, 11, -1], [0, NODES, NODES + 4, NODES + 17, NODES + 17]]


def test_the_folder_is_transformers_own(folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    np.testing.assert_array_equal(model.tables().double().numpy(), TASK.logits)
    assert tokenizer("??abd").input_ids == [2, 2, 3, 4, 6]
    assert tokenizer.decode([3, 6, 5]) == "adc"
    assert tokenizer.decode([3, 6, 5, 1, 0], skip_special_tokens=True) == "adc"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def every(tokenizer: object, prompt: str) -> torch.Tensor:
    return torch.tensor(tokenizer([prompt + text for text in COMPLETIONS]).input_ids)  # type: ignore[operator]


def test_the_probability_of_every_completion_is_the_product_over_its_prefixes(folder: Path) -> None:
    """The table is walked letter by letter; other tokens have probability 0."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    tables = torch.from_numpy(TASK.logits).log_softmax(-1)
    for number, prompt in enumerate(TASK.texts):
        tokens = every(tokenizer, prompt)
        logp = model(tokens).logits.double().log_softmax(-1)[:, number:-1]
        found = logp.gather(2, tokens[:, number + 1 :, None]).sum(dim=(1, 2))
        for text, value in zip(COMPLETIONS, found.tolist(), strict=True):
            node, expected = 0, 0.0
            for letter in map(LETTERS.index, text):
                expected += float(tables[number, node, letter])
                node = 4 * node + 1 + letter
            assert value == pytest.approx(expected, abs=1e-6)  # float32 logits
        torch.testing.assert_close(found.exp().sum(), torch.ones(()).double(), rtol=1e-6, atol=0)
        assert logp[..., :FIRST_LETTER_ID].exp().max() == 0


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation_follows_the_table_with_any_cache_and_padding(folder: Path, cache: str | None) -> None:
    """Greedy decoding needs no draws. The prompts differ in length, so the shorter one is padded."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    batch = tokenizer(TASK.texts, padding=True, return_tensors="pt")
    kept = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, disable_compile=True, **kept)
    for number, text in enumerate(tokenizer.batch_decode(made[:, -3:])):
        node, expected = 0, ""
        for _ in range(3):
            best = int(TASK.logits[number, node].argmax())
            node, expected = 4 * node + 1 + best, expected + LETTERS[best]
        assert text == expected


def test_the_backbone_and_the_output_layer_are_where_transformers_has_them(folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    tokens = every(tokenizer, "?")
    hidden = model.base_model(tokens).last_hidden_state
    assert hidden.shape == (64, 4, 2 * NODES)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(tokens).logits)
    assert [name for name, _ in model.named_parameters()] == ["lm_head.weight"]


def test_rewards_are_read_from_the_rows_of_the_prompts(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    found = score(
        TableReward(),
        ["abd", "abd", "ab"],
        ["?", "??", "?"],
        [rows[0]["metadata"], rows[1]["metadata"], rows[0]["metadata"]],
    )
    assert found.values[:2].tolist() == pytest.approx(TASK.rewards[:, 0, 1, 3].tolist())
    assert found.valid.tolist() == [True, True, False]


def test_another_seed_gives_another_task() -> None:
    other = EnumerableTask(seed=4)
    assert np.abs(other.logits - TASK.logits).min() > 0
    assert np.abs(other.rewards - TASK.rewards).min() > 0
    assert enumerable.VOCABULARY == 7
