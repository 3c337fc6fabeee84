"""Tiny pipelines of every family load in their classic classes, and their pictures depend on every input and part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_pipelines import FAMILIES, IMAGE, Family, Pipeline, draw, load

Drawn = tuple[Family, Pipeline, Tensor]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if f.slow else []) for name, f in FAMILIES.items()],
)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A family, its pipeline as the classic class loads it, and a picture."""
    family = FAMILIES[request.param]
    folder = family.build(tmp_path_factory.mktemp("pipeline"))
    pipeline = load(family, folder)
    return family, pipeline, draw(pipeline, family)


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two pictures differ by much more than the 1e-4 that comparisons with other code allow."""
    return a.shape == b.shape and (a - b).abs().max().item() > 1e-3


def test_a_picture_repeats_bit_for_bit_and_is_not_clipped_away(drawn: Drawn) -> None:
    family, pipeline, picture = drawn
    assert torch.equal(draw(pipeline, family), picture)
    assert picture.shape[-2:] == (family.inputs["height"], family.inputs["width"])
    assert picture.shape[1:-3] == ((family.inputs["num_frames"],) if "num_frames" in family.inputs else ())
    assert ((picture > 0) & (picture < 1)).double().mean() > 0.8


def test_a_picture_depends_on_the_noise_and_on_every_input(drawn: Drawn) -> None:
    family, pipeline, picture = drawn
    assert differ(draw(pipeline, family, seed=1), picture)
    # Words in other places and more words: the prompt reaches the denoiser as a whole.
    for prompt in (
        family.prompt.replace("red", "blue"),
        family.prompt.replace("circle", "square"),
        family.prompt + " red",
    ):
        assert differ(draw(pipeline, family, prompt=prompt), picture), prompt
    image = [IMAGE.rotate(180)] * 2 if isinstance(family.inputs.get("image"), list) else IMAGE.rotate(180)
    others = {"negative_prompt": "a green triangle", "guidance_scale": 2.0, "true_cfg_scale": 2.0, "image": image}
    for name in family.inputs.keys() & others.keys():
        assert differ(draw(pipeline, family, **{name: others[name]}), picture) == (
            family.inputs[name] not in (0.0, 1.0)
        ), name


def test_a_picture_depends_on_every_part_that_has_weights(drawn: Drawn) -> None:
    family, pipeline, picture = drawn
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    assert len(parts) >= 3
    for name, part in parts.items():
        kept = {key: value.clone() for key, value in part.state_dict().items()}
        with torch.no_grad():
            torch.manual_seed(1)
            for p in part.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        assert differ(draw(pipeline, family), picture), name
        part.load_state_dict(kept)
    assert torch.equal(draw(pipeline, family), picture)


def test_a_template_is_cut_off_where_the_prompt_begins(drawn: Drawn) -> None:
    """Pipelines drop a fixed number of tokens, those of their template by the published tokenizer."""
    pipeline = drawn[1]
    if not hasattr(pipeline, "prompt_template_encode_start_idx"):
        pytest.skip("no prompt template")
    tokenizer = pipeline.tokenizer
    if hasattr(pipeline, "system_message"):
        system = [{"role": "system", "content": pipeline.system_message}]
        template = tokenizer.apply_chat_template(system, tokenize=False) + "<|im_start|>user\n"
    else:
        template = getattr(pipeline, "prompt_template_encode_prefix", None) or pipeline.prompt_template_encode
    before = template.split("{}")[0].split("<|vision_start|>")[0]
    assert len(tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    assert len(tokenizer(before + "a red circle left of a blue square").input_ids) == (
        pipeline.prompt_template_encode_start_idx + 8
    )
