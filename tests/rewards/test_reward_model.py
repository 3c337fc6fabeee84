"""Tests of sequence classifiers as rewards. The score of each row is that of transformers' forward pass on that row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rewards import RewardError, make, score
from rewards.reward_model import find_label, pad_rows

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "yes", "no", "what", "is", "it", "a", "b", "c", "d"]
TEMPLATE = (
    "<s>{% for message in messages %}{{ ' ' + message['role'] + ' : ' + message['content'] + ' </s>' }}{% endfor %}"
)
PROMPTS = ["what is it", "a b", "", "is it a", "c"]
TEXTS = ["yes", "no a b c d a b", "a b c", "", "b b b b"]


def llama(folder: Path, *, chat: bool = True, padding: str | None = "<pad>", labels: int = 1) -> Path:
    """A decoder with a head. Its tokenizer has whole words and prepends <s>."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=padding
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        pad_token_id=None if padding is None else WORDS.index(padding),
        bos_token_id=1,
        eos_token_id=2,
        num_labels=labels,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def bert(folder: Path, **settings: Any) -> Path:
    """An encoder with a head."""
    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[4:]]), "utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=17, max_position_embeddings=16, initializer_range=0.5, **sizes, **settings)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def alone(folder: Path, ids: Sequence[int], **more: Sequence[int]) -> Tensor:
    """Return the library's logits [K] of one row without padding."""
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = {name: torch.tensor([list(row)]) for name, row in more.items()}
        return network(input_ids=torch.tensor([list(ids)]), **inputs).logits[0]


def number(*words: str) -> list[int]:
    return [WORDS.index(word) for word in " ".join(words).split()]


def chat(prompt: str, text: str) -> list[int]:
    return number("<s> user :", prompt, "</s> assistant :", text, "</s>")


def found(folder: Path, texts: Sequence[str] = TEXTS, prompts: Sequence[str] = PROMPTS, **options: Any) -> Tensor:
    result = score(make("reward_model", model=str(folder), **options), texts, prompts, [{}] * len(texts))
    assert result.valid.all()
    return result.values


READ: dict[str, Callable[[str, str], list[int]]] = {
    "auto": chat,
    "chat": chat,
    "joined": lambda prompt, text: number("<s>", prompt + " " + text),
    "text": lambda prompt, text: number("<s>", text),
}


@pytest.mark.parametrize("form", READ)
def test_a_decoder_with_a_chat_template(tmp_path: Path, form: str) -> None:
    llama(tmp_path)
    texts = [" " + text for text in TEXTS] if form == "joined" else TEXTS
    values = found(tmp_path, texts, form=form, batch_size=2)
    expected = [alone(tmp_path, READ[form](prompt, text)).item() for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    assert values.std() > 0.1


def test_without_a_template_the_text_stands_right_behind_its_prompt(tmp_path: Path) -> None:
    llama(tmp_path, chat=False)
    assert found(tmp_path, [" a b"], ["yes"]).item() == pytest.approx(
        alone(tmp_path, number("<s> yes a b")).item(), abs=1e-5
    )
    with pytest.raises(RewardError, match="has no chat template; choose form pair, joined or text"):
        found(tmp_path, form="chat")


@pytest.mark.parametrize("padding", [None, "</s>"])
def test_a_decoder_without_a_padding_token_of_its_own(tmp_path: Path, padding: str | None) -> None:
    """Without one, rows are scored one at a time. If it is the end-of-text token, the token before it counts, as alone."""
    llama(tmp_path, padding=padding)
    expected = [alone(tmp_path, chat(prompt, text)).item() for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    assert found(tmp_path, batch_size=5).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_models_padding_token_counts_not_the_tokenizers(tmp_path: Path) -> None:
    """With the tokenizer's <unk> as padding, the padding would have an effect."""
    llama(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path, pad_token="<unk>", padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    expected = [alone(tmp_path, chat(prompt, text)).item() for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    assert found(tmp_path, batch_size=5).tolist() == pytest.approx(expected, abs=1e-5)


def test_an_encoder_reads_pairs(tmp_path: Path) -> None:
    """The input is [CLS] prompt [SEP] answer [SEP], and the answer has another token type."""
    bert(tmp_path, num_labels=1)
    values = found(tmp_path, form="pair", batch_size=3)
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        first, second = ([number(word)[0] + 1 for word in part.split()] for part in (prompt, text))
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        expected.append(alone(tmp_path, [2, *first, 3, *second, 3], token_type_ids=types).item())
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
    assert values.std() > 0.1


@pytest.mark.parametrize(
    ("settings", "label", "probability"),
    [
        ({"num_labels": 1}, None, lambda z: z.sigmoid()[0]),
        ({"num_labels": 3}, 2, lambda z: z.softmax(0)[2]),
        ({"num_labels": 2, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}}, "POSITIVE", lambda z: z.softmax(0)[1]),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, 1, lambda z: z[1].sigmoid()),
    ],
)
def test_logits_and_probabilities(
    tmp_path: Path, settings: dict[str, Any], label: int | str | None, probability: Callable[[Tensor], Tensor]
) -> None:
    bert(tmp_path, **settings)
    logits = alone(tmp_path, [2, *(number("a")[0] + 1,), 3])
    column = {None: 0, "POSITIVE": 1}.get(label, label)  # type: ignore[arg-type]
    options = {"form": "text", "label": label}
    assert found(tmp_path, ["a"], [""], **options).item() == pytest.approx(logits[column].item(), abs=1e-5)
    value = found(tmp_path, ["a"], [""], **options, output="probability").item()
    assert value == pytest.approx(probability(logits).item(), abs=1e-6)


def test_a_text_that_is_too_long_is_invalid_or_cut(tmp_path: Path) -> None:
    bert(tmp_path, num_labels=1)  # 16 positions
    texts = ["a", " ".join("ab" * 7), " ".join("ab" * 7 + "c")]  # 3, 16 and 17 tokens
    whole = score(make("reward_model", model=str(tmp_path)), texts, [""] * 3, [{}] * 3)
    assert whole.valid.tolist() == [True, True, False]
    end = found(tmp_path, texts, [""] * 3, cut="end")
    assert end[:2].tolist() == whole.values[:2].tolist()
    ids = [number(word)[0] + 1 for word in texts[2].split()]
    assert end[2].item() == pytest.approx(alone(tmp_path, [2, *ids[:14], 3]).item(), abs=1e-5)
    start = found(tmp_path, texts, [""] * 3, cut="start")
    assert start[2].item() == pytest.approx(alone(tmp_path, [2, *ids[1:], 3]).item(), abs=1e-5)
    short = score(make("reward_model", model=str(tmp_path), longest=3), texts, [""] * 3, [{}] * 3)
    assert short.valid.tolist() == [True, False, False]


def test_a_row_without_tokens_is_invalid(tmp_path: Path) -> None:
    """This tokenizer adds no tokens to the text."""
    llama(tmp_path, chat=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path)
    result = score(make("reward_model", model=str(tmp_path)), ["", "a"], ["", ""], [{}] * 2)
    assert result.valid.tolist() == [False, True]
    assert score(make("reward_model", model=str(tmp_path)), [], [], []).values.shape == (0,)


def test_padding_by_hand() -> None:
    rows = [{"input_ids": [5], "attention_mask": [1]}, {"input_ids": [6, 7, 8], "attention_mask": [1, 1, 1]}]
    filled = pad_rows(rows, 9)
    assert filled["input_ids"].tolist() == [[5, 9, 9], [6, 7, 8]]
    assert filled["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_labels_are_chosen_by_number_or_name() -> None:
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    assert find_label(None, {0: "LABEL_0"}, 1) == 0
    assert find_label(1, names, 2) == find_label("POSITIVE", names, 2) == 1
    with pytest.raises(ValueError, match=r"has 2 labels; choose one: 0 \(NEGATIVE\), 1 \(POSITIVE\)"):
        find_label(None, names, 2)
    for absent in (2, -1, "NEUTRAL"):
        with pytest.raises(ValueError, match=f"there is no label {absent!r}; the model has: 0"):
            find_label(absent, names, 2)


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    bert(tmp_path, num_labels=1)
    network = BertForSequenceClassification.from_pretrained(tmp_path)
    body: BertModel = network.bert
    body.save_pretrained(tmp_path)
    with pytest.raises(
        RewardError, match=r"is not a trained classifier: its weights lack classifier\.bias, classifier\.w"
    ):
        found(tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    llama(tmp_path)
    exact, half = found(tmp_path), found(tmp_path, dtype="bfloat16")
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0.05)  # 8 bits of mantissa, a few dozen roundings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "template"}, "form is 'template', expected one of auto, chat, pair, joined, text"),
        ({"output": "score"}, "output is 'score', expected one of logit, probability"),
        ({"cut": "left"}, "cut is 'left', expected one of None, start, end"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"longest": 0}, "longest is 0, expected at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("reward_model", model="owner/name", **options)
    with pytest.raises(ValueError, match="missing a required argument: 'model'"):
        make("reward_model")
