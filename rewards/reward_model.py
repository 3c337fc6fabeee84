"""Learned rewards of texts: any sequence classifier of transformers, by hub id or folder.

    logit        z_k                                           the reward of a reward model with one logit
    probability  σ(z), softmax(z)_k, or σ(z_k) for labels that do not exclude each other

The model's input is the prompt with its answer: through the chat template of its tokenizer (reward models of chat
models), as a pair (reward models on encoders), concatenated, or the text alone (classifiers of sentiment, toxicity, …).

The score of a row does not depend on the other rows. Rows of similar length share a batch. They are padded on the right
with the *model's* padding token, because classifiers on decoders use the last token that is not padding. A decoder without
a padding token gets one row at a time. A text longer than the model's limit is an invalid row, unless it may be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rewards.base import Metadata, OnDevice, Samples, Scores, check_texts
from rewards.options import check_at_least_one, check_choice
from rewards.random_state import preserved_random_state
from rewards.sources import check_sources, resolve_source

INPUT_FORMS = ("auto", "chat", "pair", "joined", "text")
OUTPUTS = ("logit", "probability")
CUTS = (None, "start", "end")
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
TokenizedText = Mapping[str, list[int]]

UNBOUNDED = 10**6
"""Tokenizers without a limit report one above this."""


class _Classifier(NamedTuple):
    model: Any
    tokenizer: Any
    form: str  # not auto
    label: int
    limit: int | None  # number of tokens that fit


class RewardModel(OnDevice):
    """Score of the text by a trained reward model or classifier of transformers.

    model: hub id or folder. form: the input: chat (prompt and text through the chat template of its tokenizer), pair,
    joined (the text directly after the prompt), text (no prompt); auto is chat if there is a template, else joined. label:
    number or name of the class, required if there are several. output: logit, or probability of the class. longest: number
    of tokens, if less than the model's own limit. cut: the end at which longer texts are cut; without it they are invalid.
    dtype: auto is that of the weights.
    """

    name = "reward_model"
    needs: tuple[str, ...] = ("texts", "prompts")

    def __init__(
        self,
        *,
        model: str,
        form: Literal["auto", "chat", "pair", "joined", "text"] = "auto",
        label: int | str | None = None,
        output: Literal["logit", "probability"] = "logit",
        batch_size: int = 16,
        longest: int | None = None,
        cut: Literal["start", "end"] | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
    ) -> None:
        choices = (
            ("form", form, INPUT_FORMS),
            ("output", output, OUTPUTS),
            ("cut", cut, CUTS),
            ("dtype", dtype, DTYPE_CHOICES),
        )
        for option, value, known in choices:
            check_choice(self.name, option, value, known)
        check_at_least_one(self.name, batch_size=batch_size, longest=1 if longest is None else longest)
        check_sources(self.name, model=model)
        self.model, self.form, self.label, self.output = model, form, label, output
        self.batch_size, self.longest, self.cut, self.dtype, self.revision = batch_size, longest, cut, dtype, revision

    def preload(self) -> None:
        """Load the model now."""
        _ = self._classifier

    @torch.no_grad()
    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts, the answers to B prompts; metadata are not used."""
        loaded = self._classifier
        loaded.model.to(self._device)
        texts = check_texts(samples, self.name)
        rows = self._tokenize(loaded, prompts, texts) if len(texts) > 0 else []
        lengths = [len(row["input_ids"]) for row in rows]
        valid = [0 < length <= (loaded.limit or length) for length in lengths]
        values = torch.zeros(len(rows))
        padding = loaded.model.config.get_text_config().pad_token_id
        for batch in _batches(lengths, valid, self.batch_size if padding is not None else 1):
            inputs = pad_rows([rows[index] for index in batch], padding)
            logits = loaded.model(**{name: value.to(self._device) for name, value in inputs.items()}).logits
            values[torch.tensor(batch)] = self._to_values(loaded, logits.float()).cpu()
        return Scores(values, torch.tensor(valid, dtype=torch.bool))

    def _tokenize(self, loaded: _Classifier, prompts: Sequence[str], texts: Sequence[str]) -> list[TokenizedText]:
        """Return the model's input for each row, cut if that is allowed."""
        pairs = list(zip(prompts, texts, strict=True))
        seconds = None
        if loaded.form == "chat":
            firsts = [loaded.tokenizer.apply_chat_template(build_chat(*pair), tokenize=False) for pair in pairs]
        elif loaded.form == "pair":
            firsts, seconds = list(prompts), list(texts)
        else:
            firsts = ["".join(pair) if loaded.form == "joined" else pair[1] for pair in pairs]
        encoded = loaded.tokenizer(
            firsts,
            seconds,
            add_special_tokens=loaded.form != "chat",  # the template has added them
            truncation=self.cut is not None and loaded.limit is not None,
            max_length=loaded.limit if self.cut is not None else None,
            verbose=False,
        )
        return [{name: encoded[name][index] for name in encoded} for index in range(len(pairs))]

    def _to_values(self, loaded: _Classifier, logits: Tensor) -> Tensor:
        """Return values [B], given logits [B,K]."""
        if self.output == "logit":
            return logits[:, loaded.label]
        independent = logits.shape[1] == 1 or loaded.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if independent else logits.softmax(1))[:, loaded.label]

    @cached_property
    @preserved_random_state()
    def _classifier(self) -> _Classifier:
        """The model with its tokenizer, on the CPU."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        source = resolve_source(self.model)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=self.revision)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, revision=self.revision, dtype=self.dtype, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(
                f"{self.model} is not a trained classifier: its weights lack {', '.join(sorted(report['missing_keys'])[:4])}, "
                "which would be random; give a model that was trained to classify or to score"
            )
        form: str = self.form
        if form == "auto":
            form = "chat" if tokenizer.chat_template else "joined"
        if form == "chat" and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.model} has no chat template; choose form pair, joined or text")
        if self.cut is not None:
            tokenizer.truncation_side = "left" if self.cut == "start" else "right"
        model.eval().requires_grad_(False)
        label = find_label(self.label, model.config.id2label, model.config.num_labels)
        return _Classifier(model, tokenizer, form, label, _token_limit(self.longest, tokenizer, model.config))


def build_chat(prompt: str, text: str) -> list[dict[str, str]]:
    """Return a conversation of one prompt and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def find_label(label: int | str | None, names: Mapping[int, str], count: int) -> int:
    """Return the number of a label, given by number or name, among ``count`` labels. None is the only one."""
    known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
    if label is None:
        if count == 1:
            return 0
        raise ValueError(f"reward 'reward_model': the model has {count} labels; choose one: {known}")
    found = {name: number for number, name in names.items()}.get(label) if isinstance(label, str) else label
    if found is None or not 0 <= found < count:
        raise ValueError(f"reward 'reward_model': there is no label {label!r}; the model has: {known}")
    return found


def pad_rows(rows: Sequence[TokenizedText], padding: int | None) -> dict[str, Tensor]:
    """Return tensors [B,L] of rows, padded on the right: tokens with ``padding``, everything else with 0."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor(
            [[*row[name], *[(padding or 0) if name == "input_ids" else 0] * (longest - len(row[name]))] for row in rows]
        )
        for name in rows[0]
    }


def _batches(lengths: Sequence[int], valid: Sequence[bool], size: int) -> Iterator[list[int]]:
    """Return indices of valid rows in batches of at most ``size``, the longest first: if these fit in memory, all do."""
    order = sorted((index for index, good in enumerate(valid) if good), key=lambda index: -lengths[index])
    return (order[start : start + size] for start in range(0, len(order), size))


def _token_limit(longest: int | None, tokenizer: Any, config: Any) -> int | None:
    """Return the minimum of the option, of the tokenizer's limit and of the model's number of positions."""
    limits = (longest, tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None and limit < UNBOUNDED), default=None)
