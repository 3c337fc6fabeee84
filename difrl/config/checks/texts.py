"""Conflicts of the modality: settings for images alone or texts alone, and those of a tokens likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from difrl.config.checks.conflict import ConfigConflict
from difrl.config.schema.run import RunSections

_SHARED_ROLLOUT = frozenset({"batch", "snapshot", "precision"})
_OF_IMAGES: Mapping[str, tuple[str, ...]] = {
    "model": ("embeddings_mb", "max_sequence_length", "offload", "tiling"),
    "data": ("negative",),
    "eval": ("steps",),
}
_OF_TEXTS: Mapping[str, tuple[str, ...]] = {"eval": ("temperature",), "train": ("aggregation",)}
_OF_VLLM = frozenset({"gpu_memory", "sleep"})
_ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations of transformers, the default first."""


def check_text_settings(config: RunSections) -> Iterator[ConfigConflict]:
    """Yield the settings that do not apply to the modality of the likelihood."""
    if config.likelihood.kind == "tokens":
        yield from _not_of_images(config)
        yield from _anchors_are_unguided(config)
        yield from _recorded_texts_have_no_old(config)
        yield from _engine_has_its_settings(config)
        yield from _attention_is_of_transformers(config)
        yield from _aggregation_has_effect(config)
    else:
        yield from _not_of_texts(config)
    yield from _decision_anchors_have_single_decisions(config)
    yield from _expectations_are_known(config)
    yield from _teachers_have_own_names(config)


def _not_of_images(config: RunSections) -> Iterator[ConfigConflict]:
    given = [("rollout", key) for key in _changed(config, "rollout") if key not in _SHARED_ROLLOUT]
    given += [
        (section, key) for section, keys in _OF_IMAGES.items() for key in _changed(config, section) if key in keys
    ]
    for path in given:
        problem = "is a setting of image models, and a tokens likelihood trains a language model; remove it"
        advice = " (the settings of text sampling are under generation)" if path[0] == "rollout" else ""
        yield ConfigConflict(path, f"{path[1]} {problem}{advice}")


def _not_of_texts(config: RunSections) -> Iterator[ConfigConflict]:
    given = [("generation", key) for key in _changed(config, "generation")]
    given += [("teachers", name) for name in config.teachers]
    given += [(section, key) for section, keys in _OF_TEXTS.items() for key in _changed(config, section) if key in keys]
    for path in given:
        problem = (
            "is a setting of language models, and this likelihood is for image models; remove it, or set likelihood.kind: "
            "tokens"
        )
        yield ConfigConflict(path, f"{path[1]} {problem}")


def _changed(config: RunSections, section: str) -> Iterator[str]:
    """Yield the keys whose value differs from the default; an expanded recipe also contains the defaults."""
    found = getattr(config, section)
    for key, field in type(found).model_fields.items():
        if getattr(found, key) != field.get_default(call_default_factory=True):
            yield key


def _anchors_are_unguided(config: RunSections) -> Iterator[ConfigConflict]:
    for index, anchor in enumerate(config.anchors):
        if anchor.guidance is not None:
            yield ConfigConflict(("anchors", index, "guidance"), "guidance is a setting of image models; remove it")


def _recorded_texts_have_no_old(config: RunSections) -> Iterator[ConfigConflict]:
    if config.data.rows != "prompts" and config.likelihood.old == "recorded":
        problem = f"the texts of data.rows: {config.data.rows} come from a file, which has no recorded ℓ"
        yield ConfigConflict(
            ("likelihood", "old"), f"{problem}; set detach, or recompute and snapshots: {{old: {{decay: 0.0}}}}"
        )


def _engine_has_its_settings(config: RunSections) -> Iterator[ConfigConflict]:
    if config.generation.engine == "transformers":
        own = _OF_VLLM if config.rollout.precision != "same" else {*_OF_VLLM, "correction"}
        for key in _changed(config, "generation"):
            if key in own:
                problem = "the trained network draws the samples, so nothing is corrected and no memory is shared"
                yield ConfigConflict(("generation", key), f"{problem}; remove {key}, or set engine: vllm")
        return
    if config.rollout.precision != "same":
        problem = "vllm draws the samples with weights of its own, in model.dtype; set same, or generation.engine: transformers"
        yield ConfigConflict(("rollout", "precision"), problem)
    if (decisions := config.objective.reduction) != "each":
        problem = f"importance weights of tokens do not apply to the {decisions} over the tokens of a sample; set transformers"
        yield ConfigConflict(("generation", "engine"), f"{problem}, or objective.decisions: each")
    if config.data.rows != "prompts":
        problem = (
            f"the texts of data.rows: {config.data.rows} are read from a file, so no engine draws any; set transformers"
        )
        yield ConfigConflict(("generation", "engine"), problem)


def _aggregation_has_effect(config: RunSections) -> Iterator[ConfigConflict]:
    decisions, aggregation = config.objective.reduction, config.train.aggregation
    if decisions != "each" and aggregation != "decision":
        problem = f"the objective takes the {decisions} over the tokens of a sample, so every sample has equal weight"
        yield ConfigConflict(("train", "aggregation"), f"{problem}, found {aggregation}; remove it")


def _attention_is_of_transformers(config: RunSections) -> Iterator[ConfigConflict]:
    if (found := config.model.attention) not in _ATTENTIONS:
        problem = (
            f"found {found}, and language models have {', '.join(_ATTENTIONS)} (xformers and others are diffusers')"
        )
        yield ConfigConflict(("model", "attention"), f"{problem}; set sdpa")


def _decision_anchors_have_single_decisions(config: RunSections) -> Iterator[ConfigConflict]:
    decisions = config.objective.reduction
    for index, anchor in enumerate(config.anchors):
        if anchor.place == "decision" and decisions != "each":
            problem = f"decision gives every decision its own advantage, and the objective takes their {decisions}"
            yield ConfigConflict(
                ("anchors", index, "place"), f"{problem}; set objective.decisions: each, or place: reward"
            )


def _expectations_are_known(config: RunSections) -> Iterator[ConfigConflict]:
    for index, anchor in enumerate(config.anchors):
        if anchor.centred and config.likelihood.kind != "tokens":
            problem = "the expectation of k1 is taken over a vocabulary, which only a tokens likelihood has; set false"
            yield ConfigConflict(("anchors", index, "centred"), problem)
        elif anchor.centred and anchor.place != "decision":
            problem = (
                f"with place: {anchor.place} a token also affects the expectations of later tokens, so subtracting them would "
                "change the gradient; set place: decision, or centred: false"
            )
            yield ConfigConflict(("anchors", index, "centred"), problem)


def _teachers_have_own_names(config: RunSections) -> Iterator[ConfigConflict]:
    for name in config.teachers:
        if name in ("base", "current", *config.snapshots):
            yield ConfigConflict(
                ("teachers", name), f"the name {name} is used by a snapshot; choose another, such as teacher"
            )
