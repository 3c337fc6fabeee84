"""The weights that are trained, an adapter or all of them, and how to restore the pretrained ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from torch import nn

from difrl.config import LoraConfig, ModelConfig, RunConfig
from difrl.policies.errors import ModelError
from difrl.policies.references import needs_base
from difrl.policies.snapshots import Copy, Snapshots
from samplers import stable_seed

ADAPTER = "default"


def make_trainable(
    module: Any,
    model: ModelConfig,
    seed: int,
    *,
    lora_targets: Sequence[str] | str,
    load_adapter: Callable[[str], object],
    task_type: str | None = None,
) -> dict[str, nn.Parameter]:
    """Make a frozen module trainable. Return its trained parameters by name, in float32.

    Args:
      module: a model of diffusers or transformers.
      lora_targets: suffixes of the linear modules that LoRA adapts where the recipe gives none, or a keyword of PEFT.
      load_adapter: adds the adapter at a folder or hub id to the module, for `model.lora.warm_start`.
      task_type: PEFT's word for the kind of model, which it writes beside the adapter.
    """
    if model.train == "full":
        module.requires_grad_(True)
    else:
        with torch.random.fork_rng():  # every process and every resumed run must begin with the same adapter
            torch.manual_seed(stable_seed(seed, "lora"))
            if model.lora.warm_start is None:
                _add_lora(module, model.lora, lora_targets, task_type)
            else:
                _load_lora(module, model.lora.warm_start, load_adapter)
        adapter = module.peft_config[ADAPTER]
        if not isinstance(adapter.target_modules, str):  # a pattern, of an adapter that was made elsewhere
            # PEFT keeps the modules as a set, whose order, and so the bytes of saved files, would change from process to process.
            adapter.target_modules = sorted(adapter.target_modules)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data = p.data.float()
    return trained


def _add_lora(module: Any, lora: LoraConfig, default: Sequence[str] | str, task_type: str | None) -> None:
    names = [name for name, _ in module.named_modules()]
    if absent := [target for target in lora.targets or [] if not any(name.endswith(target) for name in names)]:
        raise ModelError(f"model.lora.targets: no module of {type(module).__name__} ends in {absent}")
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
    module.add_adapter(config, adapter_name=ADAPTER)


def _load_lora(module: Any, path: str, load_adapter: Callable[[str], object]) -> None:
    load_adapter(path)
    adapter = [p for name, p in module.named_parameters() if ".lora_" in name]
    if not adapter:
        raise ModelError(f"model.lora.warm_start: {path!r} holds no LoRA weights for {type(module).__name__}")
    for p in adapter:
        p.requires_grad_(True)


def build_snapshots(module: Any, trained: Mapping[str, nn.Parameter], config: RunConfig, keep_base: bool) -> Snapshots:
    """Build the snapshots of a run. If all weights are trained, a copy of the pretrained ones is kept where it is needed.

    keep_base: keep it also where nothing in training needs it.
    """
    device = "cpu" if config.model.copies == "cpu" else None

    @contextmanager
    def without_adapter() -> Iterator[None]:
        module.disable_adapters()
        try:
            yield
        finally:
            module.enable_adapters()

    def not_kept() -> AbstractContextManager[None]:
        raise ModelError("the pretrained weights were not kept; load the policy with keep_base=True")

    keep_base = config.model.train == "full" and (keep_base or needs_base(config))
    pretrained = Copy(trained, device) if keep_base else None
    kept = not_kept if pretrained is None else pretrained.swapped_in
    decays = {name: section.build(config.train) for name, section in config.snapshots.items()}
    base = without_adapter if config.model.train == "lora" else kept
    return Snapshots(trained, decays, base, device, pretrained)
