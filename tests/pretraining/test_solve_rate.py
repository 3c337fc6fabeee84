"""pass@k by hand and by counting, and the settings of generation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difrl.pretraining.solve_rate import (
    SolveRateSettings,
    check_answers,
    generate_completions,
    pass_at_k,
    summarise_accuracy,
)
from difrl.pretraining.tiny_lm import build_model, build_tokenizer


def test_pass_at_k_by_hand() -> None:
    """With 0, 1, 2 and 4 of 4 samples right, pass@2 is 0, 1 − 3/6, 1 − 1/6 and 1."""
    correct = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    torch.testing.assert_close(pass_at_k(correct, 2), torch.tensor([0, 1 / 2, 5 / 6, 1], dtype=torch.float64))
    torch.testing.assert_close(pass_at_k(correct, 1), correct.double().mean(1))
    assert pass_at_k(correct, 4).tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(correct, 5)


@settings(max_examples=40)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(row: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    chosen = [any(subset) for subset in itertools.combinations(row, k)]
    assert pass_at_k(torch.tensor([row]), k).item() == pytest.approx(sum(chosen) / len(chosen))


def test_summary_is_over_problems() -> None:
    greedy = torch.tensor([[True], [False]])
    sampled = torch.tensor([[True, True], [True, False]])
    found = summarise_accuracy(greedy, sampled, (2,))
    assert {name: mean for name, (mean, _) in found.items()} == {"greedy": 0.5, "sampled": 0.75, "pass@2": 1.0}
    assert found["sampled"][1] == pytest.approx(0.25)  # std of (1, 0.5) is 0.354, over √2
    assert found["pass@2"][1] == 0


def test_a_problem_without_an_answer_is_named() -> None:
    assert check_answers([["1", "2"], ["2", "2"]], [{"answer": "2"}, {"answer": "2"}]).tolist() == [
        [False, True],
        [True, True],
    ]
    with pytest.raises(ValueError, match=r"no answer that can be verified, its metadata are \{'tag': 3\}"):
        check_answers([["1"]], [{"tag": 3}])


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    tokenizer = build_tokenizer()
    return build_model(tokenizer, 0).eval(), tokenizer


def test_greedy_completions_are_the_argmax_whatever_the_batch(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = ["1+2=", "47+38=", "9-0="]
    found = generate_completions(model, tokenizer, prompts, 1, SolveRateSettings(5, temperature=0.0))
    assert found == generate_completions(model, tokenizer, prompts, 1, SolveRateSettings(5, temperature=0.0, batch=1))
    for prompt, (text,) in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[0, len(prompt) + 1 :], skip_special_tokens=True)


def test_samples_are_by_prompt_and_by_seed_and_leave_the_generator_alone(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    state = torch.get_rng_state()
    first, again, other = (
        generate_completions(model, tokenizer, ["1+2=", "3+4="], 6, SolveRateSettings(4, seed=seed, batch=6))
        for seed in (0, 0, 1)
    )
    assert [len(texts) for texts in first] == [6, 6]
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
