"""Published models without their weights: folders in the format of diffusers that `difrl check` can read.

tests/published.yaml has their configurations, and names the source of each.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ClassifierFreeGuidance, ModelMixin, QwenImagePipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from difrl.pretraining.tiny_parts import build_tokenizer
from difrl.tasks import shapes
from tests.tiny_models import build_t5_tokenizer
from tests.tiny_pipelines import (
    CHAT_TEMPLATE,
    MISTRAL_TEMPLATE,
    build_mistral_tokenizer,
    build_qwen_tokenizer,
    get_template,
)

_DATA = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PARTS: Mapping[str, Mapping[str, Any]] = _DATA["parts"]
MODELS: Mapping[str, Mapping[str, Any]] = _DATA["models"]


def _build_pixtral_processor() -> PixtralProcessor:
    tokenizer = build_mistral_tokenizer([SYSTEM_MESSAGE])
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=14, chat_template=MISTRAL_TEMPLATE)


def _build_qwen2_vl_processor() -> Qwen2VLProcessor:
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), _build_qwen_tokenizer(), Qwen2VLVideoProcessor(), CHAT_TEMPLATE)


def _build_qwen3_vl_processor() -> Qwen3VLProcessor:
    images = Qwen2VLImageProcessor(patch_size=16)
    return Qwen3VLProcessor(images, _build_qwen_tokenizer(), Qwen3VLVideoProcessor(), CHAT_TEMPLATE)


def _build_qwen_tokenizer() -> Qwen2Tokenizer:
    return build_qwen_tokenizer([get_template(QwenImagePipeline)])


TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "clip": lambda: build_tokenizer([p.text for p in shapes.prompts()]),
    "t5": build_t5_tokenizer,
    "byt5": ByT5Tokenizer,
    "qwen": _build_qwen_tokenizer,
    "qwen2-vl": _build_qwen2_vl_processor,
    "qwen3-vl": _build_qwen3_vl_processor,
    "clip-image": CLIPImageProcessor,
    "mistral": lambda: build_mistral_tokenizer([]),
    "pixtral": _build_pixtral_processor,
}
"""Kind -> builder of a tiny tokenizer, or of a processor with one, of the same class."""


def build_part(name: str, device: str = "meta", changes: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a part with random weights, some of its settings changed."""
    cls, config = _get_class(name), {**PARTS[name]["config"], **(changes or {})}
    with torch.device(device):
        built: nn.Module
        built = cls.from_config(config) if issubclass(cls, ModelMixin) else cls(cls.config_class(**config))
    return built


def count_weights(module: nn.Module) -> int:
    """Return the number of weights that a checkpoint of the module holds. A tensor with several names counts once."""
    tensors = {id(tensor): tensor.numel() for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensors.values())


def build_folder(name: str, folder: Path) -> Path:
    """Write the folder of a published model: all its configurations, tiny tokenizers, and weight files without tensors."""
    model = MODELS[name]
    index: dict[str, Any] = {"_class_name": model["pipeline"], **model.get("index", {})}
    for part, key in model["parts"].items():
        cls, config = _get_class(key), PARTS[key]["config"]
        index[part] = [PARTS[key]["class"].split(".")[0], cls.__name__]
        if issubclass(cls, ModelMixin):
            _write_json(folder / part / "config.json", {"_class_name": cls.__name__, **config})
            save_file({}, folder / part / "diffusion_pytorch_model.safetensors")
        else:
            cls.config_class(**config).save_pretrained(folder / part)
            save_file({}, folder / part / "model.safetensors")
    for part, (kind, length) in model["tokenizers"].items():
        tokenizer = TOKENIZERS[kind]()
        getattr(tokenizer, "tokenizer", tokenizer).model_max_length = length
        tokenizer.save_pretrained(folder / part)
        index[part] = ["transformers", type(tokenizer).__name__]
    if "guider" in model:
        ClassifierFreeGuidance(**model["guider"]).save_pretrained(folder / "guider")
        index["guider"] = ["diffusers", "ClassifierFreeGuidance"]
    scheduler = getattr(diffusers, model["scheduler"]["class"])(**model["scheduler"]["config"])
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    _write_json(folder / "model_index.json", index)
    return folder


def _get_class(part: str) -> Any:
    library, name = PARTS[part]["class"].split(".")
    return getattr(importlib.import_module(library), name)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")
