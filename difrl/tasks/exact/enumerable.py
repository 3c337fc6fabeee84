"""The enumerable task: a language model with 64 possible completions, so that every expectation is an exact sum.

Completions have three tokens of four letters each, and every letter has a free logit after every prefix. The tokens so far
decide a *node*. The hidden state is the node's one-hot vector, so the weight of the output layer, an ordinary linear one, is
the table of logits itself: [vocabulary, nodes]. There is nothing else to train, and every distribution over the 64
completions of a prompt is one setting of the table. Fixed points can then be computed
(difrl/tasks/exact/enumerable_solutions.py) and compared with the result of training.

The nodes of a prompt form a tree, numbered level by level: 0 before the first letter, 4 n + 1 + v after letter v at node n.
A prompt is a row of question marks, and their number identifies it, so prompts differ in length.
Importing this module registers the model with AutoModelForCausalLM. A cache of any kind holds the tokens themselves.
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
"""Tokens of a completion. All completions have the same length."""
PAD_ID, END_ID, ASK_ID, FIRST_LETTER_ID = 0, 1, 2, 3
"""Token ids. Padding is 0 because a static cache is filled with zeros."""
VOCABULARY = FIRST_LETTER_ID + len(LETTERS)
NODES = sum(len(LETTERS) ** depth for depth in range(LENGTH))
NEVER = -1e4
"""Logit of tokens that are never generated: probability and gradient are exactly 0 in float32 and in float64."""
COMPLETIONS = ["".join(letters) for letters in itertools.product(LETTERS, repeat=LENGTH)]
"""All 64 completions, in the order of flattened arrays [4, 4, 4]."""


class TabularConfig(PreTrainedConfig):
    """Configuration: the number of prompts decides the size of the table."""

    model_type = "difrl_tabular"

    def __init__(self, prompts: int = 1, **kwargs: Any) -> None:
        self.prompts = prompts
        self.hidden_size, self.vocab_size = prompts * NODES, VOCABULARY
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = self.head_dim = 1
        self.max_position_embeddings = prompts + LENGTH
        super().__init__(**{"pad_token_id": PAD_ID, "eos_token_id": END_ID, "tie_word_embeddings": False, **kwargs})


class TabularPreTrainedModel(PreTrainedModel):
    """Settings of transformers that the backbone and the whole model share."""

    config_class = TabularConfig
    base_model_prefix = "model"
    # There is no attention, so every implementation works.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


class TokenNumbers(nn.Module):
    """The embedding: the token id itself, exact in every float type. A buffer, because it is not trained."""

    weight: Tensor

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.arange(vocabulary, dtype=torch.float32)[:, None])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the ids as floats, [B, T] -> [B, T, 1]."""
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
        """Return last_hidden_state [B, T, prompts · NODES] for input_ids [B, T].

        Padding has its own token id, so the mask is not needed. The state is 0 at positions after which no letter is chosen:
        before the prompt and after the last letter.
        """
        tokens, past = input_ids, past_key_values
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        seen = 0
        if past is not None:
            seen = int(past.get_seq_length())
            keys = self.embed_tokens(input_ids)[:, None]  # one head of one dimension
            tokens = past.update(keys, keys, 0)[0][:, 0, :, 0].long()
        rows = table_rows(tokens)[:, seen : seen + input_ids.shape[1]]
        states = F.one_hot(rows + 1, self.config.hidden_size + 1)[..., 1:].to(self.embed_tokens.weight.dtype)
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past)


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
        """Return logits [B, T, VOCABULARY], or only those of the last `logits_to_keep` positions."""
        output = self.model(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)

    @torch.no_grad()
    def set_tables(self, tables: Tensor) -> None:
        """Set the logits of the letters at every node, [prompts, NODES, 4]."""
        self.lm_head.weight.fill_(NEVER)
        self.lm_head.weight[FIRST_LETTER_ID:] = tables.flatten(0, 1).T

    def tables(self) -> Tensor:
        """Return the logits of the letters at every node, [prompts, NODES, 4], detached."""
        return self.lm_head.weight.detach()[FIRST_LETTER_ID:].T.reshape(self.config.prompts, NODES, len(LETTERS))


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM)


def table_rows(tokens: Tensor) -> Tensor:
    """Return prompt · NODES + node after each token, [B, T] -> [B, T] int64; -1 where the table has no row."""
    prompt = (tokens == ASK_ID).cumsum(dim=1)
    node, nodes = tokens.new_zeros(len(tokens)), []
    for token in tokens.unbind(dim=1):
        node = torch.where(token >= FIRST_LETTER_ID, len(LETTERS) * node + 1 + token - FIRST_LETTER_ID, node)
        nodes.append(node)
    after = torch.stack(nodes, dim=1)
    return torch.where((prompt > 0) & (after < NODES), (prompt - 1) * NODES + after, -1)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    names = {
        "<pad>": PAD_ID,
        "<end>": END_ID,
        "?": ASK_ID,
        **{letter: FIRST_LETTER_ID + v for v, letter in enumerate(LETTERS)},
    }
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


@dataclass(frozen=True)
class EnumerableTask:
    """Random logits of the base model and random rewards for every completion of every prompt, drawn from one seed."""

    seed: int = 0
    prompts: int = 2
    spread: float = 1.0
    """Standard deviation of the logits, and of the rewards."""

    @property
    def texts(self) -> list[str]:
        """The prompts."""
        return ["?" * (number + 1) for number in range(self.prompts)]

    @property
    def logits(self) -> np.ndarray:
        """Logits of the base model, [prompts, NODES, 4] float64 (values that float32 holds)."""
        return self._normal("logits", (self.prompts, NODES, len(LETTERS)))

    @property
    def rewards(self) -> np.ndarray:
        """Reward of every completion, [prompts, 4, 4, 4] float64 (values that float32 holds)."""
        return self._normal("rewards", (self.prompts, *[len(LETTERS)] * LENGTH))

    def _normal(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        drawn = np.random.default_rng([self.seed, len(name)]).normal(scale=self.spread, size=shape)
        return drawn.astype(np.float32).astype(np.float64)

    def build(self) -> TabularForCausalLM:
        """Return the base model."""
        model = TabularForCausalLM(TabularConfig(self.prompts))
        model.set_tables(torch.from_numpy(self.logits))
        return model

    def save(self, folder: Path) -> Path:
        """Write folder/model for from_pretrained, and folder/prompts.jsonl with a table of rewards in each row's metadata."""
        self.build().save_pretrained(folder / "model")
        build_tokenizer().save_pretrained(folder / "model")
        rows = [
            {"prompt": text, "metadata": {"rewards": dict(zip(COMPLETIONS, table.flatten().tolist(), strict=True))}}
            for text, table in zip(self.texts, self.rewards, strict=True)
        ]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return folder


class TableReward:
    """r(y) from the table metadata["rewards"]. A text that is none of the completions cannot be scored."""

    name, needs = "table", ("texts", "metadata")

    def __call__(self, texts: Sequence[str], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        values = torch.tensor(
            [row["rewards"].get(text, float("nan")) for text, row in zip(texts, metadata, strict=True)]
        )
        return Scores(values, values.isfinite())

    def to(self, device: torch.device | str) -> TableReward:
        return self
