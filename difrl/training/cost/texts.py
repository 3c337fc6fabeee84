"""What a run of a language model would cost: its parts of an estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from difrl.config import RunConfig
from difrl.config.run import samples_base_at_end
from difrl.policies.language.flops import build_language_skeleton, count_text_cost
from difrl.policies.language.load import get_teacher_key, load_tokenizer, make_language_model_trainable
from difrl.policies.language.tokenization import TextTokenizer, build_texts
from difrl.policies.model_paths import LANGUAGE_MODEL, resolve
from difrl.policies.references import snapshots_used
from difrl.policies.snapshots import BASE
from difrl.runtime.dtypes import DTYPES
from difrl.training.cost.parts import Inputs, Parts, Words, kept
from difrl.training.cost.plan_texts import TextPlan
from samplers import context_of

WORDS = Words(
    heading="Tokens read and written, at most",
    rollout="drawing, prompts included",
    unit="a token",
    left_out="Not in it: rewards and files. Completions may end early, which takes less; drawing is bound by memory rather "
    "than by products, and a model so small that it leaves the device idle takes longer.",
)
# One token at a time for each sample keeps products small: far below the speed of large ones.
EFFICIENCY = (0.03, 0.5)


def text_parts(config: RunConfig, inputs: Inputs, processes: int) -> Parts:
    """On the meta device; the tokenizer alone is loaded."""
    assert config.likelihood.kind == "tokens"
    model, dtype = config.model, DTYPES[config.model.dtype]
    texts = build_texts(load_tokenizer(model), config.generation)
    network = build_language_skeleton(model.path, model.revision, model)
    recorded, drawn = inputs.recorded, inputs.train if config.data.rows == "prompts" else []
    texts.validate_prompts([*drawn, *inputs.evaluation, *(e.prompt for e in recorded)], context_of(network))
    if recorded:
        texts.validate_completions([str(i) for e in recorded for i in e.items], [p for e in recorded for p in e.places])
    trained = _trained(network, config)
    teachers = {
        name: build_language_skeleton(t.path, t.revision, model, get_teacher_key(name))
        for name, t in config.teachers.items()
    }
    plan = TextPlan(config, _lengths(texts, inputs.train), _lengths(texts, inputs.evaluation), processes)
    base = BASE in (*config.drawn_by, *snapshots_used(config)) or samples_base_at_end(config)
    memory = kept(config, [network], trained, base)
    memory |= {f"teacher {name}": sum(p.nbytes for p in one.parameters()) for name, one in teachers.items()}
    frozen = sum(p.numel() for m in (network, *teachers.values()) for p in m.parameters() if not p.requires_grad)
    cost = count_text_cost(network, plan.length, dtype, model.gradient_checkpointing)
    memory["keys and values of a rollout batch"] = cost.cache * plan.drawn_together * plan.longest // plan.length
    memory["logits of a chunk, with gradient"] = (
        3 * cost.logits * min(config.likelihood.chunk, plan.together * plan.written)
    )
    memory["activations, rough bound"] = cost.body.activations * plan.together
    return Parts(
        model=f"{type(network).__name__} at {resolve(model.path, LANGUAGE_MODEL)}",
        frozen=frozen,
        trained=sum(p.numel() for p in trained),
        memory=memory,
        evaluations=plan.evaluations(),
        forward=cost.body.forward // plan.length + cost.head,
        # The head's logits are spelled out again in the backward pass.
        training=cost.body.training // plan.length + 4 * cost.head,
        words=replace(WORDS, counted={"generated": plan.generated}),
        efficiency=EFFICIENCY,
    )


def _trained(network: Any, config: RunConfig) -> list[torch.nn.Parameter]:
    lora = config.model.lora.model_copy(update={"warm_start": None})
    with torch.device("meta"):
        trained = make_language_model_trainable(network, config.model.model_copy(update={"lora": lora}), config.seed)
    return list(trained.values())


def _lengths(texts: TextTokenizer, prompts: Any) -> list[int]:
    return [len(texts.tokenize(prompt)) for prompt in prompts]
