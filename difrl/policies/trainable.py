"""The weights that are trained, an adapter or all of them, and how to restore the pretrained ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from difrl.config import LoraConfig, ModelConfig, RunConfig
from difrl.policies.errors import ModelError
from difrl.policies.layout import build_layout
from difrl.policies.quantization import is_quantized
from difrl.policies.references import needs_base
from difrl.policies.snapshots import Copy, Snapshots
from samplers import stable_seed

ADAPTER = "default"
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, LoraLayer)
"""Modules that LoRA adapts (PEFT), and those that have an adapter."""


def make_trainable(
    module: Any,
    model: ModelConfig,
    seed: int,
    *,
    lora_targets: Sequence[str] | str,
    load_adapter: Callable[[str], object],
    task_type: str | None = None,
) -> None:
    """Make a frozen module trainable. Its trained parameters become float32.

    Args:
      module: a model of diffusers or transformers.
      lora_targets: suffixes of the linear modules that LoRA adapts where the recipe gives none, or a keyword of PEFT.
      load_adapter: adds the adapter at a folder or hub id to the module, for `model.lora.warm_start`.
      task_type: PEFT's word for the kind of model, which it writes beside the adapter.
    """
    if model.train == "full":
        if is_quantized(module):
            raise ModelError(
                f"model.train: full trains all weights, and those of {model.path} are quantised; set model.train: lora"
            )
        module.requires_grad_(True)
    else:
        with torch.random.fork_rng():  # every process and every resumed run must begin with the same adapter
            torch.manual_seed(stable_seed(seed, "lora"))
            if model.lora.warm_start is None:
                _add_lora(module, model.lora, lora_targets, task_type)
            else:
                _load_lora(module, model.lora.warm_start, load_adapter)
        for adapter in [part.peft_config[ADAPTER] for part in module.modules() if hasattr(part, "peft_config")]:
            if not isinstance(adapter.target_modules, str):  # a pattern, of an adapter that was made elsewhere
                # PEFT keeps a set, whose order, and so the bytes of saved files, would change from process to process.
                adapter.target_modules = sorted(adapter.target_modules)
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                # Otherwise PEFT casts the input to float32, and autocast casts it back: two copies for the backward pass.
                layer.cast_input_dtype_enabled = False
    for p in module.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def _add_lora(module: Any, lora: LoraConfig, default: Sequence[str] | str, task_type: str | None) -> None:
    if lora.targets is not None:
        find_targets(module, lora.targets)
    targets = lora.targets or default
    if not targets:
        raise ModelError(
            f"model.train: {type(module).__name__} has no modules that LoRA adapts by default; set model.lora.targets, or "
            "model.train: full"
        )
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task_type,
    )
    try:
        module.add_adapter(config, adapter_name=ADAPTER)
    except (
        ValueError
    ) as error:  # a module that PEFT cannot adapt with this rank, or none that fits the family's defaults
        raise ModelError(f"model.lora: no adapter can be added to {type(module).__name__}: {error}") from error


def _load_lora(module: Any, path: str, load_adapter: Callable[[str], object]) -> None:
    load_adapter(path)
    adapter = [p for name, p in module.named_parameters() if ".lora_" in name]
    if not adapter:
        raise ModelError(f"model.lora.warm_start: {path!r} holds no LoRA weights for {type(module).__name__}")
    for p in adapter:
        p.requires_grad_(True)


def find_targets(module: nn.Module, targets: Sequence[str]) -> set[str]:
    """Return the names of the modules that `model.lora.targets` adapts. A target is a name, or its end after a dot.

    Raise ModelError with every target that no module has, or whose modules LoRA cannot adapt.
    """
    modules = {name: part for name, part in module.named_modules() if name}
    adaptable = [name for name, part in modules.items() if isinstance(part, ADAPTABLE)]
    found, problems = set[str](), list[str]()
    for target in targets:
        matched = {name for name in modules if name == target or name.endswith(f".{target}")}
        if unfit := sorted(matched.difference(adaptable)):
            inside = {name.removeprefix(f"{unfit[0]}.") for name in adaptable if name.startswith(f"{unfit[0]}.")}
            advice = f"; it holds {', '.join(sorted(inside)[:8])}" if inside else ""
            kind = type(modules[unfit[0]]).__name__
            problems.append(f"{target!r} is {kind} ({unfit[0]}), and LoRA adapts linear layers{advice}")
        elif not matched:
            ends = {".".join(name.split(".")[-n:]) for name in adaptable for n in (1, 2)}
            near = get_close_matches(target, ends, n=5, cutoff=0.5) or sorted(end for end in ends if target in end)[:5]
            problems.append(f"no module is called {target!r}" + (f"; similar names: {', '.join(near)}" if near else ""))
        found |= matched
    if problems:
        raise ModelError(
            f"model.lora.targets: {type(module).__name__}: {'. '.join(problems)}. Expected names of linear layers, or the ends "
            "of names after a dot"
        )
    return found


def check_adapter(module: nn.Module, lora: LoraConfig) -> None:
    """Raise ModelError if the adapter of a new run is not the one that its recipe describes, or cannot be merged.

    An adapter that the run continues from has a rank, a strength and modules of its own, which the recipe need not repeat.
    """
    if problem := describe_shared_adapter(module):
        raise ModelError(f"model.lora.targets: {problem}; leave it out of the targets")
    layers = {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}
    if not layers:
        return
    strengths: Mapping[str, tuple[float | None, set[float]]] = {
        "rank": (lora.rank, {layer.r[ADAPTER] for layer in layers.values()}),
        "alpha": (lora.alpha, {layer.lora_alpha[ADAPTER] for layer in layers.values()}),
    }
    for key, (wanted, found) in strengths.items():
        if wanted is not None and found != {wanted}:
            raise ModelError(
                f"model.lora.{key}: found {wanted:g}, and the adapter at model.lora.warm_start has "
                f"{', '.join(f'{value:g}' for value in sorted(found))}, which cannot change; remove {key}"
            )
    if lora.targets is not None and (other := find_targets(module, lora.targets).symmetric_difference(layers)):
        raise ModelError(
            f"model.lora.targets: found {lora.targets}, and the adapter at model.lora.warm_start is on other modules (they "
            f"differ by {min(other)}); remove targets"
        )


def describe_shared_adapter(module: nn.Module) -> str | None:
    """Return a sentence about an adapter on weights that another module shares; None if there is none.

    Such an adapter changes one of the two modules in training. Merged, or as another engine receives it, it changes both.
    """
    owners = defaultdict[int, list[str]](list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.rpartition(".")[0].removesuffix(".base_layer"))
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            others = {n for p in layer.get_base_layer().parameters(recurse=False) for n in owners[id(p)]} - {name}
            if others:
                return f"{name} shares its weights with {min(others)}, so an adapter on it can neither be merged nor sent to vLLM"
    return None


def build_snapshots(module: Any, config: RunConfig, keep_base: bool, device: torch.device | str) -> Snapshots:
    """Lay out the weights of a trainable module on a device, and build the snapshots of a run.

    If all weights are trained, a copy of the pretrained ones is kept where it is needed. keep_base: keep it also where nothing
    in training needs it.
    """
    layout = build_layout(module, config.model, device)
    away = "cpu" if config.model.copies == "cpu" else None

    @contextmanager
    def without_adapter() -> Iterator[None]:
        module.disable_adapters()
        try:
            yield
        finally:
            module.enable_adapters()
            # PEFT sets it for the parameters in place. With FSDP2 these may be others than those that it takes it from.
            for p in layout.parameters.values():
                p.requires_grad_(True)

    def not_kept() -> AbstractContextManager[None]:
        raise ModelError("the pretrained weights were not kept; load the policy with keep_base=True")

    keep_base = config.model.train == "full" and (keep_base or needs_base(config))
    pretrained = Copy(layout, away) if keep_base else None
    kept = not_kept if pretrained is None else pretrained.swapped_in
    decays = {name: section.build(config.train) for name, section in config.snapshots.items()}
    base = without_adapter if config.model.train == "lora" else kept
    return Snapshots(layout, decays, base, away, pretrained)
