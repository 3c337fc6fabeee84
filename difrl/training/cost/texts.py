"""Cost of a language model, from its layers without weights, and a dry run with a model of two tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from difrl.config import RunConfig
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.importance_sampling import get_correction
from difrl.policies.language.engines import Engines
from difrl.policies.language.gradient_checkpointing import recompute_layers
from difrl.policies.language.load import build_language_policy
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.language.tokenization import build_texts
from difrl.policies.model_paths import LANGUAGE_MODEL, resolve
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.dry_run import DryPolicy, Tally, dry_config
from difrl.training.cost.flops import Cost, count_call_cost
from difrl.training.cost.model_cost import ROLLOUT, UPDATE, ModelCost
from difrl.training.inputs import Inputs
from samplers import Completions, Processing


def count_text_cost(config: RunConfig, policy: LanguagePolicy, inputs: Inputs) -> ModelCost:
    """Return the cost of a policy on the meta device, and a dry policy for it.

    Completions are taken to have all their tokens, prompts the mean number of theirs.
    """
    assert config.likelihood.kind == "tokens"
    written, chunk, network = config.generation.max_new_tokens, config.likelihood.chunk, policy.network.model
    lengths, evaluated = (
        list(map(len, policy.tokenizer.tokenize_prompts(group))) for group in (inputs.train, inputs.evaluation)
    )
    length = round(sum(lengths) / len(lengths)) + written
    evaluation_length = sum(evaluated) / max(1, len(evaluated)) + written
    tally = Tally()
    dtype = DTYPES[config.model.dtype]
    skeleton = nn.Module.to(copy.deepcopy(network), dtype)  # autocast casts trained weights too
    if not config.model.gradient_checkpointing:
        with suppress(ModelError):  # of a model that marks no layers
            recompute_layers(skeleton)
    cost, cache = _count_body_cost(skeleton.base_model, length)
    head = skeleton.get_output_embeddings()
    head_flops = 2 * sum(p.numel() for p in head.parameters() if p.dim() == 2)  # of one token: 2 × width × vocabulary

    def working_memory(config: RunConfig, together: int) -> dict[str, dict[str, int]]:
        drawn_together = min(config.rollout.batch, tally.drawn)
        logits = 4 * head.weight.shape[0]  # of one token, float32
        scale = DTYPES[config.model.dtype].itemsize / dtype.itemsize
        recomputed = config.model.gradient_checkpointing and cost.recomputed is not None
        activations = cost.recomputed if recomputed else cost.activations
        keys = cache * drawn_together * (max(lengths) + written) // length
        return {
            ROLLOUT: {"keys and values of a rollout batch": int(keys * scale)},
            UPDATE: {
                "logits of a chunk, with gradient": 3 * logits * min(chunk, together * written),
                "activations, rough bound": int((activations or 0) * together * scale),
            },
        }

    drawn = config.data.prompts_per_step * config.data.group_size if config.data.rows == "prompts" else 0
    return ModelCost(
        name=f"{type(network).__name__} at {resolve(config.model.path, LANGUAGE_MODEL)}",
        modules=[network],
        dry=DryPolicy(_build_dry_policy(config, tally), tally, {0: config.train.steps}, length, evaluation_length),
        forward=cost.forward // length + head_flops,
        # The backward pass makes the logits again.
        training=(cost.training + cost.forward * config.model.gradient_checkpointing) // length + 4 * head_flops,
        working_memory=working_memory,
        # One token at a time for each sample keeps products small: far below the speed of large ones.
        efficiency=(0.03, 0.5),
        teachers={name: teacher.model for name, teacher in policy.teachers.items()},
        notes=policy.tokenizer.notes,
        generated=drawn * written,
    )


def _count_body_cost(body: Any, length: int) -> tuple[Cost, int]:
    """Return the cost of a text of `length` tokens without the head, and the bytes of its keys and values."""
    tokens = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # transformers uses a mask of four dimensions as it is. Of any other it reads values, and meta tensors have none.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    with torch.no_grad():
        cache = body(input_ids=tokens, attention_mask=mask, use_cache=True).past_key_values
    cost = count_call_cost(body, lambda: body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state)
    return cost, sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


class _TwoTokenModel(nn.Module):
    """A language model that gives both of its tokens the logit 0, whatever the text."""

    device = torch.device("cpu")
    out_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 2))


@dataclass(frozen=True)
class _TwoTokens:
    """A tokenizer that gives every prompt one token, and every completion as many as there may be."""

    written: int
    eos_token = "end"
    pad_token = "pad"

    def get_vocab(self) -> dict[str, int]:
        return {"pad": 0, "end": 1}

    def __call__(self, text: str | Sequence[str], **settings: Any) -> dict[str, list[Any]]:
        return {"input_ids": [0] if isinstance(text, str) else [[0] * (self.written - 1)] * len(text)}

    def batch_decode(self, rows: Sequence[object], **settings: Any) -> list[str]:
        return [""] * len(rows)


def _build_dry_policy(config: RunConfig, tally: Tally) -> LanguagePolicy:
    """Build a policy that counts texts as its evaluations: each that passes through its model or a teacher."""
    written = config.generation.max_new_tokens
    model, *others = (_TwoTokenModel() for _ in range(1 + len(config.teachers)))
    teachers = dict(zip(config.teachers, others, strict=True))
    dry = dry_config(config)
    texts = build_texts(_TwoTokens(written), dry.generation)
    policy = build_language_policy(dry, model, texts, teachers, "cpu", keep_base=True)

    def count(module: nn.Module, arguments: object, inputs: dict[str, Tensor]) -> None:
        texts = len(inputs["input_ids"])
        tally.add(texts)
        policy.evaluations += texts

    def draw(
        prompts: Sequence[Sequence[int]],
        samples: Tensor,
        key: NoiseKey,
        temperature: float,
        processors: Sequence[Processing] = (),
    ) -> Completions:
        texts, shape = len(prompts), (len(prompts), written)
        tally.drawn = max(tally.drawn, texts)
        # The policy adds the tokens of the completions. Every processor is another model that reads them.
        policy.evaluations += texts * (1 + len(processors) - written)
        mask, logp = torch.ones(shape, dtype=torch.bool), torch.full(shape, -math.log(2))
        return Completions(torch.zeros(shape, dtype=torch.int64), mask, logp)

    for one in (model, *others):
        one.register_forward_pre_hook(count, with_kwargs=True)
    policy.engines = Engines(draw, draw, get_correction(config))
    return policy
