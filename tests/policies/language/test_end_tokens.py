"""The tokens that end a completion: all that the model's files name, and the same ones wherever a completion has an end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from difrl.config import DataConfig, GenerationConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.jsonl import DataFileError
from difrl.data.modality import IMAGES, TEXTS
from difrl.data.prompts import Prompt
from difrl.data.recorded_samples import load_recorded_samples
from difrl.inference.loaded_run import open_run
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.language.load import load_language_policy, load_texts, read_end_tokens
from difrl.policies.language.tokenization import build_texts
from difrl.training.cost.estimate import estimate
from tests.policies.language import vllm_double
from tests.recipes import text_recipe
from tests.texts import prompt_file
from tests.tiny_models import CHARACTERS, characters_tokenizer, tiny_lm

END, EQUALS, ONE, TWO = 1, CHARACTERS.index("="), CHARACTERS.index("1"), CHARACTERS.index("2")
TURN = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def change(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**found, **values}))


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generation_config.json ends texts at "=" too, as conversations end a turn, and config.json at "2"."""
    folder = tiny_lm(tmp_path_factory.mktemp("models") / "turns")
    change(folder / "generation_config.json", eos_token_id=[END, EQUALS])
    change(folder / "config.json", eos_token_id=TWO)
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 3}}, (3,)),
        ({"generation_config.json": {"eos_token_id": [1, 7]}}, (1, 7)),
        ({"generation_config.json": {"eos_token_id": [7, 1]}, "config.json": {"eos_token_id": 1}}, (7, 1)),
        ({"config.json": {"eos_token_id": [4, 5], "text_config": {"eos_token_id": 6}}}, (4, 5, 6)),
        ({"config.json": {"eos_token_id": -1, "text_config": None}}, ()),
    ],
)
def test_the_ends_are_those_of_both_files(tmp_path: Path, files: Mapping[str, Any], expected: tuple[int, ...]) -> None:
    """A class of transformers may have a default, which is another token of another tokenizer: only files count."""
    change(tmp_path / "config.json", model_type="llama")
    for name, values in files.items():
        change(tmp_path / name, **values)
    assert read_end_tokens(str(tmp_path)) == expected


def test_a_completion_ends_at_any_of_them_wherever_it_is_read(turns: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler, the mask, the text that rewards read, the likelihood, and vLLM's engine."""
    policy = load_language_policy(text_recipe(turns, generation={"max_new_tokens": 12}))
    ends = (END, EQUALS, TWO)
    assert policy.tokenizer.eos == ends
    prompts = [Prompt("1+1=", {})] * 40
    rollout = policy.rollout(prompts, torch.zeros(40), torch.arange(40), NoiseKey(0, 0))
    tokens, mask = rollout.replay_data["tokens"], rollout.replay_data["mask"]
    seen = set[int]()
    assert rollout.texts is not None
    for row, counts, text in zip(tokens.tolist(), mask.tolist(), rollout.texts, strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        assert counts == [i < length for i in range(len(row))]
        seen |= {row[length - 1]} & {*ends}
        shown = row[: length - 1] if row[length - 1] in ends else row[:length]
        assert text == "".join(CHARACTERS[token] for token in shown if token > END)
    assert seen == {*ends}  # or the test tells nothing
    key = NoiseKey(0, 0)
    decisions = policy.decisions(rollout, key)
    again = policy.recompute_logprobs(rollout, decisions)
    torch.testing.assert_close(again, rollout.replay_data["log_prob"], rtol=0, atol=1e-4)

    monkeypatch.setitem(sys.modules, "vllm", vllm_double)
    other = load_language_policy(text_recipe(turns, generation={"max_new_tokens": 12, "engine": "vllm"}))
    drawn = other.rollout(prompts, torch.zeros(40), torch.arange(40), key).replay_data
    for row, counts in zip(drawn["tokens"].tolist(), drawn["mask"].tolist(), strict=True):
        assert not any(token in ends for token, counted in zip(row, counts[1:], strict=False) if counted)


def test_a_plain_model_and_the_check_have_the_same_ends(turns: Path, tmp_path: Path) -> None:
    assert open_run(turns, device="cpu").policy.tokenizer.eos == (END, EQUALS, TWO)  # type: ignore[attr-defined]
    data = {"train": str(prompt_file(tmp_path)), "evaluation": None}
    notes = estimate(text_recipe(turns, data=data, eval={"every": 0})).model.notes
    assert notes == ["completions end at '<eos>' or '=' or '2'"]


def test_the_recipe_may_choose_other_ends(turns: Path) -> None:
    model = text_recipe(turns).model
    assert load_texts(model, GenerationConfig(eos=["1"])).eos == (ONE,)
    texts = load_texts(model, GenerationConfig(eos=["1"]))
    # An end that the recipe chose is part of the text, as it always was.
    assert texts.decode(torch.tensor([[TWO, ONE]]), torch.ones(1, 2, dtype=torch.bool)) == ("21",)


@pytest.mark.parametrize(("before", "after"), [([], [END]), ([TWO], [END]), ([TWO], [EQUALS, END]), ([TWO], [])])
def test_what_a_tokenizer_adds_after_a_text_is_not_in_a_prompt(before: list[int], after: list[int]) -> None:
    """Otherwise the completion would follow an end, where a model usually ends again at once."""
    tokenizer = characters_tokenizer()
    pieces = [*(CHARACTERS[i] for i in before), "$A", *(CHARACTERS[i] for i in after)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(pieces), special_tokens=[(CHARACTERS[i], i) for i in (*before, *after)]
    )
    assert tokenizer("11")["input_ids"] == [*before, ONE, ONE, *after]
    texts = build_texts(tokenizer, GenerationConfig())
    assert texts.tokenize(Prompt("11", {})) == [*before, ONE, ONE]
    assert texts.tokenize(Prompt("", {})) == before
    assert len(texts.notes) == (2 if after else 1)


def test_a_recorded_completion_has_one_end(lm: Path) -> None:
    texts = build_texts(characters_tokenizer(), GenerationConfig(max_new_tokens=5), [EQUALS])
    assert texts.tokenize_completions(["1", "1<eos>", "1="]) == [[ONE, END], [ONE, END], [ONE, EQUALS]]
    with pytest.raises(ModelError, match=r"a:2: a completion has the end token '<eos>' before its end"):
        texts.validate_completions(["1", "1<eos>2"], ["a:1", "a:2"])
    with pytest.raises(ModelError, match=r"a:1: a completion has the end token '<eos>'"):
        texts.validate_completions(["1<eos><eos>"], ["a:1"])
    with pytest.raises(ModelError, match=r"a:1: both completions have the same tokens"):
        texts.validate_completions(["1", "1<eos>", "1", "2"], ["a:1", "a:1", "a:2", "a:2"])


def test_a_recorded_answer_ends_as_the_chat_template_ends_it() -> None:
    tokenizer = characters_tokenizer((*CHARACTERS, *"abcdefghijklmnopqrstuvwxyz"))
    tokenizer.chat_template = TURN
    assert build_texts(tokenizer, GenerationConfig(), [END, EQUALS]).tokenize_completions(["1"]) == [[ONE, EQUALS]]
    assert build_texts(tokenizer, GenerationConfig(), [END, TWO]).tokenize_completions(["1"]) == [[ONE, END]]
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}"
    )
    assert build_texts(tokenizer, GenerationConfig(), [END]).tokenize_completions(["1"]) == [[ONE, END]]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (WITHOUT_SYSTEM + TURN, "System role not supported"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "leaves out"),
        (
            "{{ messages[0].content if messages|length == 1 else messages[9].content + 1 }}",
            "no element|undefined|Undefined",
        ),
    ],
)
def test_a_template_without_a_system_message_is_refused(template: str, problem: str) -> None:
    tokenizer = characters_tokenizer()
    tokenizer.chat_template = template
    build_texts(tokenizer, GenerationConfig())
    with pytest.raises(ModelError, match=rf"generation\.system: .*no system message.*({problem}).*; remove it"):
        build_texts(tokenizer, GenerationConfig(system="Be brief."))


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "{{ tools[3].name + 1 }}", "nothing", "{{ 1 / 0 }}"]
)
def test_a_template_that_cannot_write_a_prompt_is_refused(template: str) -> None:
    tokenizer = characters_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=r"generation\.chat: the tokenizer's chat template .*generation\.chat: false"):
        build_texts(tokenizer, GenerationConfig())
    build_texts(tokenizer, GenerationConfig(chat=False))


def test_identical_sides_of_a_pair_are_refused_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "1+1=", "chosen": a, "rejected": b} for a, b in (("2", "3"), ("2", "2"))]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(train=str(file), rows="pairs", group_size=2)
    with pytest.raises((DataFileError, ConfigError), match=r"pairs\.jsonl:2: .*are the same"):
        load_recorded_samples(data, TEXTS)
    for name, colour in (("a", 1.0), ("b", 0.0), ("copy", 1.0)):
        IMAGES.write(torch.full((1, 3, 8, 8), colour), tmp_path, name)
    pairs = [("a", "b"), ("a", "a"), ("a", "copy")]
    rows = [{"prompt": "x", "chosen": f"images/{one}.png", "rejected": f"images/{other}.png"} for one, other in pairs]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises((DataFileError, ConfigError)) as caught:
        load_recorded_samples(data, IMAGES)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "3"]
