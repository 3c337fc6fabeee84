"""Loading of a language policy: the model, its adapter, its snapshots, its engines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from difrl.config import GenerationConfig, ModelConfig, RunConfig
from difrl.policies.compilation import compile_blocks
from difrl.policies.errors import LOADING_ERRORS, ModelError
from difrl.policies.importance_sampling import get_correction
from difrl.policies.language.engines import Engines, Transformers
from difrl.policies.language.gradient_checkpointing import recompute_layers
from difrl.policies.language.lm_head import CausalLM
from difrl.policies.language.policy import GenerationSettings, LanguagePolicy
from difrl.policies.language.tokenization import TextTokenizer, build_texts
from difrl.policies.language.vllm_engine import start_vllm
from difrl.policies.layout import is_sharded, shard
from difrl.policies.merge_adapters import merge_adapters
from difrl.policies.model_paths import LANGUAGE_MODEL, resolve
from difrl.policies.quantization import build_quantization
from difrl.policies.references import build_reference_set
from difrl.policies.rollout_precision import check_precision
from difrl.policies.tokenizer_state import remember_padding
from difrl.policies.trainable import ADAPTER, build_snapshots, make_trainable
from difrl.policies.trained_policy import ModelFiles
from difrl.policies.warm_start import PEFT_LORA, load_warm_start
from difrl.policies.weight_files import check_weights
from difrl.runtime.dtypes import DTYPES
from difrl.runtime.quiet_libraries import silenced_libraries
from samplers import Decoding


def load_language_policy(
    config: RunConfig, device: torch.device | str = "cpu", *, keep_base: bool = False
) -> LanguagePolicy:
    """Load the policy of a run before its first step.

    keep_base: keep the pretrained weights also where no anchor needs them.
    """
    texts = load_texts(config.model, config.generation)
    place = "cpu" if is_sharded(config.model) else device  # its layout moves a block at a time
    model = load_frozen(config.model.path, config.model.revision, config.model, place)
    teachers = {
        name: load_frozen(t.path, t.revision, config.model, place, get_teacher_key(name))
        for name, t in config.teachers.items()
    }
    return build_language_policy(config, model, texts, teachers, device, keep_base=keep_base)


def build_language_policy(
    config: RunConfig,
    model: Any,
    texts: TextTokenizer,
    teachers: Mapping[str, Any],
    device: torch.device | str,
    *,
    keep_base: bool = False,
) -> LanguagePolicy:
    """Build the policy of a run over a frozen model, which is laid out on a device, and its teachers."""
    likelihood, generation = config.likelihood, config.generation
    assert likelihood.kind == "tokens"
    dtype = DTYPES[config.model.dtype]
    if config.model.gradient_checkpointing:
        recompute_layers(model)
    if config.model.compile and model.device.type != "meta":
        compile_blocks(model, model.device)
    make_language_model_trainable(model, config.model, config.seed)
    snapshots = build_snapshots(model, config, keep_base, device)
    network = CausalLM.build(model, dtype)  # after the adapter, which may be on the head
    if is_sharded(config.model):
        for teacher in teachers.values():
            shard(teacher, config.model, device)
    teacher_networks = {name: CausalLM.build(teacher, dtype) for name, teacher in teachers.items()}
    for name, teacher in teacher_networks.items():
        _check_vocabulary(name, network, teacher)
    temperature = generation.temperature
    settings = GenerationSettings(
        temperature,
        temperature if config.eval.temperature is None else config.eval.temperature,
        config.rollout.snapshot,
        config.rollout.batch,
        likelihood.chunk,
    )
    decoding = Decoding(generation.max_new_tokens, temperature, generation.cache, texts.eos, texts.pad)
    return LanguagePolicy(
        network,
        texts,
        settings,
        build_engines(config, network, decoding),
        snapshots,
        build_reference_set(config),
        teacher_networks,
        _build_files(model, texts.tokenizer),
    )


def build_engines(config: RunConfig, network: CausalLM, decoding: Decoding) -> Engines:
    """Build the engines of a recipe. Evaluations are drawn by the model itself, since they may be guided.

    No other engine is started for a model without weights, on the meta device.
    """
    own = Transformers(network, decoding, config.rollout.batch)
    if config.generation.engine == "transformers" or network.model.device.type == "meta":
        check_precision(network.model, config.rollout.precision, network.dtype)
        return Engines(replace(own, precision=config.rollout.precision), own, get_correction(config))
    path = resolve(config.model.path, LANGUAGE_MODEL)
    other = start_vllm(path, config.model, config.generation, network, decoding, config.rollout.batch)
    return Engines(other, own, get_correction(config))


def load_texts(model: ModelConfig, generation: GenerationConfig) -> TextTokenizer:
    """Load the tokenizer of the model, with the tokens at which the model's texts end."""
    from transformers import AutoTokenizer

    path = resolve(model.path, LANGUAGE_MODEL)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: the tokenizer of {path!r} cannot be loaded: {error}") from error
    return build_texts(tokenizer, generation, read_end_tokens(path, model.revision))


def read_end_tokens(path: str, revision: str | None = None) -> tuple[int, ...]:
    """Return the tokens that end a text by a model's generation_config.json and config.json.

    Models that were tuned on conversations often have the end of a turn there, beside the tokenizer's end of a text.
    """
    from transformers import GenerationConfig as ModelGenerationConfig
    from transformers import PreTrainedConfig

    sources = list[Any]()
    with suppress(OSError):  # not every model has a generation_config.json
        sources.append(ModelGenerationConfig.from_pretrained(path, revision=revision).eos_token_id)
    # The file itself: an object of the config has defaults of its class, which another tokenizer uses for other tokens.
    with suppress(OSError):  # reported where the model is loaded
        written = PreTrainedConfig.get_config_dict(path, revision=revision)[0]
        sources += [written.get("eos_token_id"), (written.get("text_config") or {}).get("eos_token_id")]
    tokens = [token for found in sources for token in (found if isinstance(found, list) else [found])]
    return tuple(dict.fromkeys(token for token in tokens if isinstance(token, int) and token >= 0))


def get_teacher_key(name: str) -> str:
    """Return the key of a teacher's path in a recipe."""
    return f"teachers.{name}.path"


def load_frozen(
    path: str, revision: str | None, model: ModelConfig, device: torch.device | str, key: str = "model.path"
) -> Any:
    """Load a causal language model in evaluation mode, without gradients, in the precision and attention of a recipe.

    On the meta device it has no weights, to count its cost. key: the key of the recipe that holds `path`, for messages.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = resolve(path, LANGUAGE_MODEL, key)
    try:
        with silenced_libraries():
            if torch.device(device).type == "meta":
                description, missing = AutoConfig.from_pretrained(path, revision=revision), list[str]()
                attention = "eager" if model.attention == "eager" else "sdpa"  # others may need another machine
                with torch.device("meta"):
                    found: Any = AutoModelForCausalLM.from_config(
                        description, dtype=DTYPES[model.dtype], attn_implementation=attention
                    )
                if Path(path).is_dir():
                    check_weights(Path(path), ["model.safetensors", "pytorch_model.bin"], found, key)
            else:
                quantized = (
                    {}
                    if model.quantize == "none"
                    else {"quantization_config": build_quantization(model, "transformers")}
                )
                found, report = AutoModelForCausalLM.from_pretrained(
                    path,
                    revision=revision,
                    dtype=DTYPES[model.dtype],
                    attn_implementation=model.attention,
                    output_loading_info=True,
                    **quantized,
                )
                missing = sorted(report["missing_keys"])
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{key}: {path!r} cannot be loaded as a causal language model ({type(error).__name__}: {error}); expected a "
            "transformers folder or hub id. For a hub model check the name, the network and `hf auth login`"
        ) from error
    if missing:
        raise ModelError(
            f"{key}: the weights of {path!r} lack {len(missing)} tensors that its config.json describes, such as {missing[0]}, "
            "and would be filled with random numbers; copy or download the model again"
        )
    found.to(device).requires_grad_(False).eval()
    return found


def make_language_model_trainable(network: Any, model: ModelConfig, seed: int) -> None:
    """Make a causal language model trainable. Its trained parameters become float32."""
    make_trainable(
        network,
        model,
        seed,
        lora_targets="all-linear",
        load_adapter=lambda path: load_warm_start(path, PEFT_LORA, partial(_load_adapter, network)),
        task_type="CAUSAL_LM",
    )


def _load_adapter(network: Any, path: str) -> list[str]:
    """Load an adapter. Return the names of tensors that only the file or only the model has, or with different shapes."""
    found = network.load_adapter(path, adapter_name=ADAPTER, is_trainable=True)
    return sorted({*found.missing_keys, *found.unexpected_keys, *(str(key) for key in found.mismatched_keys)})


def _check_vocabulary(name: str, network: CausalLM, teacher: CausalLM) -> None:
    own, other = (n.model.get_output_embeddings().out_features for n in (network, teacher))
    if own != other:
        raise ModelError(
            f"teachers.{name}: found {other} tokens, expected the {own} of the model; distributions over different vocabularies "
            "cannot be compared, so choose a teacher with the same tokenizer"
        )


def _build_files(model: Any, tokenizer: Any) -> ModelFiles:
    """Return the functions that write the adapter (LoRA) or the model (full), and the whole model, with the tokenizer."""
    restore_padding = remember_padding([tokenizer])

    def save(folder: Path) -> None:
        restore_padding()
        with silenced_libraries():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def merge(folder: Path) -> None:
        merge_adapters(model)
        save(folder)

    return ModelFiles(save, merge)
