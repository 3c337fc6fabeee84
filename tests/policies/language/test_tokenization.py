"""Requirements on a tokenizer, and prompts that a language model rejects."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from difrl.config import GenerationConfig
from difrl.data.prompts import Prompt, load_prompts
from difrl.policies.errors import ModelError
from difrl.policies.language.tokenization import TextTokenizer, build_texts
from difrl.tasks.exact.enumerable import build_tokenizer


def tokenizer_of(lm: Path, **tokens: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(lm / "tokenizer.json"), **{"pad_token": "<pad>", "eos_token": "<eos>", **tokens}
    )


def texts(lm: Path, **generation: Any) -> TextTokenizer:
    return build_texts(tokenizer_of(lm), GenerationConfig(max_new_tokens=5, **generation))


def test_a_tokenizer_without_pad_or_eos_is_told_what_to_set(lm: Path) -> None:
    with pytest.raises(ModelError, match=r"no pad token.*set generation\.pad, e\.g\. '<eos>'"):
        build_texts(tokenizer_of(lm, pad_token=None), GenerationConfig())
    with pytest.raises(ModelError, match=r"no eos token, so a completion could never end; set generation\.eos"):
        build_texts(tokenizer_of(lm, eos_token=None), GenerationConfig())
    with pytest.raises(ModelError, match=r"generation\.eos: '<end>' is not among the 15 tokens"):
        texts(lm, eos=["<end>"])


def test_the_recipe_says_what_the_tokenizer_does_not(lm: Path) -> None:
    bare = tokenizer_of(lm, pad_token=None, eos_token=None)
    found = build_texts(bare, GenerationConfig(pad="<eos>", eos=["<eos>", "="]))
    assert (found.pad, found.eos) == (1, (1, 13))


def test_chat_and_system_want_a_template(lm: Path) -> None:
    with pytest.raises(ModelError, match=r"generation\.chat: the tokenizer has no chat template"):
        texts(lm, chat=True)
    with pytest.raises(ModelError, match=r"generation\.system: prompts are taken as they are"):
        texts(lm, system="Be brief.")


def test_prompts_that_do_not_fit_are_all_named_with_their_lines(lm: Path, tmp_path: Path) -> None:
    """The context of 8 leaves room for 3 tokens of a prompt beside 5 of a completion."""
    path = tmp_path / "prompts.txt"
    path.write_text("1+1\n# a comment\n1+12\n\n12+12")
    texts(lm).validate_prompts(load_prompts(str(path)), 10)
    with pytest.raises(ModelError) as caught:
        texts(lm).validate_prompts(load_prompts(str(path)), 8)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"{path}:3: 4 tokens, and with generation.max_new_tokens 5 the model's context of 8 leaves")
    assert second.startswith(f"{path}:5: 5 tokens")


def test_lines_of_json_and_numbers_of_built_in_sets(lm: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"prompt": "1+1"}\n\n{"prompt": "1+11"}')
    with pytest.raises(ModelError, match=r"prompts\.jsonl:4: 4 tokens"):
        texts(lm).validate_prompts(load_prompts(str(path)), 8)
    assert load_prompts("shapes:train")[1].place == "shapes:train, number 2"


def test_a_prompt_without_tokens_and_a_long_list_of_problems(lm: Path) -> None:
    with pytest.raises(ModelError, match=r"^the prompt '': no tokens, but the first token"):
        texts(lm).validate_prompts([Prompt("", {})], float("inf"))
    with pytest.raises(ModelError, match=r"and 2 prompts more$"):
        texts(lm).validate_prompts([Prompt("1+1", {})] * 12, 6)


def test_a_completion_that_ends_at_once_is_an_empty_text(lm: Path) -> None:
    tokens, mask = torch.tensor([[1, 0, 0], [3, 1, 0]]), torch.tensor([[True, False, False], [True, True, False]])
    assert texts(lm).decode(tokens, mask) == ("", "1")


def test_recorded_completions_may_not_be_empty_or_too_long(lm: Path) -> None:
    assert texts(lm).tokenize_completions(["1", "1234"]) == [[3, 1], [3, 4, 5, 6, 1]]  # "0" is token 2, the end 1
    texts(lm).validate_completions(["1", "1234"], ["a:1", "a:2"])
    with pytest.raises(ModelError) as caught:
        texts(lm).validate_completions(["", "1", "12345"], ["a:1", "a:2", "a:4"])
    first, second = str(caught.value).split("\n")
    assert first.startswith("a:1: a completion without tokens, expected at least one")
    assert second.startswith("a:4: a completion has 6 tokens, its end included, and generation.max_new_tokens is 5")
    with pytest.raises(ModelError, match=r"and 2 completions more$"):
        texts(lm).validate_completions([""] * 12, ["a:1"] * 12)


def test_what_several_samples_are_asked_is_tokenized_once() -> None:
    tokenizer = Mock(wraps=build_tokenizer(), chat_template=None, pad_token="<pad>", eos_token="<end>")
    texts = build_texts(tokenizer, GenerationConfig(max_new_tokens=3))
    tokenizer.reset_mock()
    assert texts.tokenize_prompts([Prompt(text, {}) for text in ("?", "??", "?", "?")]) == [[2], [2, 2], [2], [2]]
    assert tokenizer.call_count == 2
