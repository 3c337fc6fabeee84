"""A language model of which everything is known: four letters, three tokens, a free logit for each after each prefix.

The tokens so far decide a *node*, and the hidden state is the node's one-hot vector, so the output layer, an ordinary linear
one, is the table of logits itself: [vocabulary, nodes]. There is nothing else to train, and every distribution over
the 64 completions of a prompt is one setting of the table. Fixed points can then be computed (enumerable_answers.py) and
compared with what training finds.

The nodes of a prompt are those of a tree, numbered level by level: 0 before the first letter, 4 n + 1 + v after letter v at
node n. A prompt is a row of question marks, and which one it is, is how many there are: prompts differ in length.
Importing this module registers the model with AutoModelForCausalLM; a cache of any kind holds the tokens themselves.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from rewards import Scores

LETTERS = "abcd"
LENGTH = 3
"""Tokens of a completion; nothing ends one earlier."""
PAD, END, ASK, FIRST = 0, 1, 2, 3
"""Token ids. Padding is 0 because that is what a static cache holds where nothing was written yet."""
VOCABULARY = FIRST + len(LETTERS)
NODES = sum(len(LETTERS) ** depth for depth in range(LENGTH))
SHUT = -1e4
"""Logit of what is never generated: its probability is exactly 0 in float32 and in float64, and so is its gradient."""
COMPLETIONS = ["".join(letters) for letters in itertools.product(LETTERS, repeat=LENGTH)]
"""All 64, in the order in which arrays of shape [4, 4, 4] are flattened."""


class TabularConfig(PreTrainedConfig):
    """Of a table of logits for a number of prompts."""

    model_type = "difrl_tabular"

    def __init__(self, prompts: int = 1, **kwargs: Any) -> None:
        self.prompts = prompts
        self.hidden_size, self.vocab_size = prompts * NODES, VOCABULARY
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = self.head_dim = 1
        self.max_position_embeddings = prompts + LENGTH
        super().__init__(**{"pad_token_id": PAD, "eos_token_id": END, "tie_word_embeddings": False, **kwargs})


class TabularPreTrainedModel(PreTrainedModel):
    """What transformers asks of both parts."""

    config_class = TabularConfig
    base_model_prefix = "model"
    # There is no attention, so every implementation of it will do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


class TokenNumbers(nn.Module):
    """The embedding: a token's number, exact in every float type. A buffer, since there is nothing in it to train."""

    weight: Tensor

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(vocabulary, dtype=torch.float32)[:, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, 1]."""
        return F.embedding(input_ids, self.weight)


class TabularModel(TabularPreTrainedModel):
    """The backbone, without parameters: tokens -> one-hot nodes."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.embed_tokens = TokenNumbers(config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] -> last_hidden_state [B, T, prompts · NODES]. Padding says of itself what it is, so that no mask is
        needed. Where no decision follows (before the prompt, after the last letter), the state is 0."""
        tokens, past = input_ids, past_key_values
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        seen = 0
        if past is not None:
            seen = int(past.get_seq_length())
            keys = self.embed_tokens(input_ids)[:, None]  # one head of one dimension
            tokens = past.update(keys, keys, 0)[0][:, 0, :, 0].long()
        states = nodes(tokens)[:, seen : seen + input_ids.shape[1]]
        rows = F.one_hot(states + 1, self.config.hidden_size + 1)[..., 1:].to(self.embed_tokens.weight.dtype)
        return BaseModelOutputWithPast(last_hidden_state=rows, past_key_values=past)


class TabularForCausalLM(TabularPreTrainedModel, GenerationMixin):
    """The backbone and the table, weight [VOCABULARY, prompts · NODES]."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """logits [B, T, VOCABULARY], or at the last `logits_to_keep` positions."""
        found = self.model(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)

    @torch.no_grad()
    def write(self, tables: Tensor) -> None:
        """Sets the logits of the letters at every node, [prompts, NODES, 4]."""
        self.lm_head.weight.fill_(SHUT)
        self.lm_head.weight[FIRST:] = tables.flatten(0, 1).T

    def tables(self) -> Tensor:
        """Logits of the letters at every node, [prompts, NODES, 4]; detached."""
        return self.lm_head.weight.detach()[FIRST:].T.reshape(self.config.prompts, NODES, len(LETTERS))


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM)


def nodes(tokens: Tensor) -> Tensor:
    """prompt · NODES + node after each token, [B, T] -> [B, T] int64; -1 where there is no such row of the table."""
    asked = (tokens == ASK).cumsum(dim=1)
    node, found = tokens.new_zeros(len(tokens)), []
    for token in tokens.unbind(dim=1):
        node = torch.where(token >= FIRST, len(LETTERS) * node + 1 + token - FIRST, node)
        found.append(node)
    after = torch.stack(found, dim=1)
    return torch.where((asked > 0) & (after < NODES), (asked - 1) * NODES + after, -1)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    names = {"<pad>": PAD, "<end>": END, "?": ASK, **{letter: FIRST + v for v, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


@dataclass(frozen=True)
class EnumerableWorld:
    """Random logits of the base model and random rewards for every completion of every prompt, all by one seed."""

    seed: int = 0
    prompts: int = 2
    spread: float = 1.0
    """Standard deviation of logits, and of rewards."""

    @property
    def texts(self) -> list[str]:
        """The prompts."""
        return ["?" * (number + 1) for number in range(self.prompts)]

    @property
    def logits(self) -> np.ndarray:
        """Of the base model, [prompts, NODES, 4] float64 (values that float32 holds)."""
        return self._normal("logits", (self.prompts, NODES, len(LETTERS)))

    @property
    def rewards(self) -> np.ndarray:
        """[prompts, 4, 4, 4] float64 (values that float32 holds)."""
        return self._normal("rewards", (self.prompts, *[len(LETTERS)] * LENGTH))

    def _normal(self, use: str, shape: tuple[int, ...]) -> np.ndarray:
        drawn = np.random.default_rng([self.seed, len(use)]).normal(scale=self.spread, size=shape)
        return drawn.astype(np.float32).astype(np.float64)

    def build(self) -> TabularForCausalLM:
        """The base model."""
        model = TabularForCausalLM(TabularConfig(self.prompts))
        model.write(torch.from_numpy(self.logits))
        return model

    def save(self, folder: Path) -> Path:
        """Writes folder/model for from_pretrained, and folder/prompts.jsonl with a table of rewards in each row's metadata."""
        self.build().save_pretrained(folder / "model")
        build_tokenizer().save_pretrained(folder / "model")
        rows = [
            {"prompt": text, "metadata": {"rewards": dict(zip(COMPLETIONS, table.flatten().tolist(), strict=True))}}
            for text, table in zip(self.texts, self.rewards, strict=True)
        ]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return folder


class TableReward:
    """r(y) as metadata["rewards"] has it; a text that is none of the completions cannot be scored."""

    name, needs = "table", ("texts", "metadata")

    def __call__(self, texts: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        found = [row["rewards"].get(text, float("nan")) for text, row in zip(texts, metadata, strict=True)]
        values = torch.tensor(found)
        return Scores(values, values.isfinite())

    def to(self, device: torch.device | str) -> TableReward:
        return self
