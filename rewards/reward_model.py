"""Learned rewards of texts: any sequence classifier of transformers, by hub id or folder.

    logit        z_k                                           a reward model's reward, where it has one logit
    probability  σ(z), softmax(z)_k, or σ(z_k) of several labels that do not exclude each other

A model reads the prompt with its answer: through the chat template of its tokenizer (reward models of chat models), as a
pair (reward models of encoders), one behind the other, or the text alone (classifiers of sentiment, of toxicity, …).

Each row scores what it scores alone. Rows of similar length share a batch; they are padded on the right with the token
that the *model* takes for padding, since classifiers over a decoder read the last token that is another. A decoder that
knows none is given one row at a time. A text beyond what the model can read is an invalid row, unless it may be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rewards.base import Metadata, Samples, Scores, check_texts

FORMS = ("auto", "chat", "pair", "joined", "text")
OUTPUTS = ("logit", "probability")
CUTS = (None, "start", "end")
DTYPES = ("auto", "float32", "bfloat16", "float16")
Row = Mapping[str, list[int]]

UNBOUNDED = 10**6
"""Tokenizers that know no limit name one beyond this."""


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    form: str  # not auto
    label: int
    limit: int | None  # tokens that the model can read


class RewardModel:
    """What a trained reward model or classifier (transformers, by hub id or folder) says of the text.

    form: what it reads: chat (prompt and text through the chat template of its tokenizer), pair, joined (the text right
    behind the prompt), text (no prompt); auto is chat where there is a template, else joined. label: number or name of the
    class, needed where there are several. output: logit, or probability of the class. longest: tokens, where it should be
    less than the model can read. cut: which end of longer ones is left out; without it they are invalid. dtype: auto is
    that of the weights.
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
        choices = (("form", form, FORMS), ("output", output, OUTPUTS), ("cut", cut, CUTS), ("dtype", dtype, DTYPES))
        for option, value, known in choices:
            _check_choice(option, value, known)
        for option, number in (("batch_size", batch_size), ("longest", longest)):
            if number is not None and number < 1:
                raise ValueError(f"reward 'reward_model': {option} is {number}, expected at least 1")
        self.model, self.form, self.label, self.output = model, form, label, output
        self.batch_size, self.longest, self.cut, self.dtype, self.revision = batch_size, longest, cut, dtype, revision
        self._kept: _Loaded | None = None
        self._device = torch.device("cpu")

    def to(self, device: torch.device | str) -> RewardModel:
        """Move the model."""
        self._device = torch.device(device)
        return self

    @torch.no_grad()
    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score B texts, the answers to B prompts; metadata are not read."""
        loaded = self._load()
        texts = check_texts(samples, self.name)
        rows = self._tokens(loaded, prompts, texts) if len(texts) > 0 else []
        lengths = [len(row["input_ids"]) for row in rows]
        valid = [0 < length <= (loaded.limit or length) for length in lengths]
        values = torch.zeros(len(rows))
        padding = loaded.model.config.get_text_config().pad_token_id
        for batch in _batches(lengths, valid, self.batch_size if padding is not None else 1):
            inputs = padded([rows[index] for index in batch], padding)
            logits = loaded.model(**{name: value.to(self._device) for name, value in inputs.items()}).logits
            values[torch.tensor(batch)] = self._read(loaded, logits.float()).cpu()
        return Scores(values, torch.tensor(valid, dtype=torch.bool))

    def _tokens(self, loaded: _Loaded, prompts: Sequence[str], texts: Sequence[str]) -> list[Row]:
        """What the model reads of each row, cut where it may be."""
        pairs = list(zip(prompts, texts, strict=True))
        seconds = None
        if loaded.form == "chat":
            firsts = [loaded.tokenizer.apply_chat_template(turns(*pair), tokenize=False) for pair in pairs]
        elif loaded.form == "pair":
            firsts, seconds = list(prompts), list(texts)
        else:
            firsts = ["".join(pair) if loaded.form == "joined" else pair[1] for pair in pairs]
        encoded = loaded.tokenizer(
            firsts,
            seconds,
            add_special_tokens=loaded.form != "chat",  # the template has written them
            truncation=self.cut is not None and loaded.limit is not None,
            max_length=loaded.limit if self.cut is not None else None,
            verbose=False,
        )
        return [{name: encoded[name][index] for name in encoded} for index in range(len(pairs))]

    def _read(self, loaded: _Loaded, logits: Tensor) -> Tensor:
        """Values [B] of logits [B,K]."""
        if self.output == "logit":
            return logits[:, loaded.label]
        apart = logits.shape[1] == 1 or loaded.model.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if apart else logits.softmax(1))[:, loaded.label]

    def _load(self) -> _Loaded:
        if self._kept is None:
            self._kept = self._loaded()
        self._kept.model.to(self._device)
        return self._kept

    def _loaded(self) -> _Loaded:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            self.model, revision=self.revision, dtype=self.dtype, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(
                f"{self.model} is no trained classifier: its weights lack {', '.join(sorted(report['missing_keys'])[:4])}, "
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
        label = chosen_label(self.label, model.config.id2label, model.config.num_labels)
        return _Loaded(model, tokenizer, form, label, _limit(self.longest, tokenizer, model.config))


def turns(prompt: str, text: str) -> list[dict[str, str]]:
    """A conversation of one prompt and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def chosen_label(label: int | str | None, names: Mapping[int, str], count: int) -> int:
    """The column of the logits that is the reward, of ``count``."""
    known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
    if label is None:
        if count == 1:
            return 0
        raise ValueError(f"reward 'reward_model': the model has {count} labels; choose one: {known}")
    found = {name: number for number, name in names.items()}.get(label) if isinstance(label, str) else label
    if found is None or not 0 <= found < count:
        raise ValueError(f"reward 'reward_model': there is no label {label!r}; the model has: {known}")
    return found


def padded(rows: Sequence[Row], padding: int | None) -> dict[str, Tensor]:
    """Tensors [B,L] of rows of tokens, filled up on the right: tokens with ``padding``, all else with 0."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor(
            [[*row[name], *[(padding or 0) if name == "input_ids" else 0] * (longest - len(row[name]))] for row in rows]
        )
        for name in rows[0]
    }


def _batches(lengths: Sequence[int], valid: Sequence[bool], size: int) -> Iterator[list[int]]:
    """Indices of valid rows, at most ``size`` together, the longest first: memory that suffices then suffices."""
    order = sorted((index for index, good in enumerate(valid) if good), key=lambda index: -lengths[index])
    return (order[start : start + size] for start in range(0, len(order), size))


def _limit(longest: int | None, tokenizer: Any, config: Any) -> int | None:
    """Tokens that may be read: the least of the option, of the tokenizer's limit, and of the model's positions."""
    told = (longest, tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None))
    return min((limit for limit in told if limit is not None and limit < UNBOUNDED), default=None)


def _check_choice(option: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"reward 'reward_model': {option} is {value!r}, expected one of {', '.join(map(str, known))}")
