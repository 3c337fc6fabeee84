"""Compiled blocks: the numbers, the names and the snapshots of plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from tests.helpers import perturb
from tests.recipes import FLOW_GRPO, load_training_prompts, recipe, text_recipe
from tests.tiny_models import tiny_sd

OLD = {"snapshots": {"old": {"decay": 0.5}}}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


def build(model: Path, tmp_path: Path, **keys: Any) -> Any:
    settings = {"train": "lora", "lora": {"rank": 2}, **keys}
    if (model / "model_index.json").exists():
        return recipe(model, tmp_path / "run", model=settings, **OLD, **(FLOW_GRPO if model.name == "sd35" else {}))
    (tmp_path / "prompts.txt").write_text("1+2=\n3+4=\n5+5=\n9+9=\n")
    return text_recipe(model, tmp_path / "run", model=settings, data={"train": str(tmp_path / "prompts.txt")}, **OLD)


def measure(config: Any) -> dict[str, Tensor]:
    """Return ℓ under θ, its gradient, and ℓ under the pretrained weights and a snapshot, of one rollout."""
    policy: Any = load_policy(config, keep_base=True)
    names = list(policy.module.state_dict())
    perturb(policy.parameters, 0.2)
    policy.snapshots.update(0)
    prompts = load_training_prompts(config)[:2]
    rollout = policy.rollout(prompts, torch.arange(2), torch.arange(2), NoiseKey(0, 0))
    decisions = policy.decisions(rollout, NoiseKey(0, 0))
    others = {name: policy.recompute_logprobs(rollout, decisions, snapshot=name) for name in ("base", "old")}
    logp = policy.likelihoods(rollout, decisions).logp
    logp.sum().backward()
    assert list(policy.module.state_dict()) == names
    return {**others, "logp": logp.detach()} | {name: p.grad for name, p in policy.parameters.items()}


@pytest.mark.parametrize(
    ("model", "blocks"),
    [("sd35", {"JointTransformerBlock"}), ("lm", {"Qwen2DecoderLayer"}), ("sd", {"BasicTransformerBlock"})],
)
def test_repeated_blocks_are_compiled_in_place(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    blocks: set[str],
) -> None:
    place, compiled = request.getfixturevalue(model), list[str]()
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    names = list(load_policy(build(place, tmp_path)).module.state_dict())
    assert not compiled
    policy = load_policy(build(place, tmp_path, compile=True))
    assert blocks <= set(compiled)
    assert list(policy.module.state_dict()) == names
    assert load_policy(build(place, tmp_path, compile=True), "meta")  # `difrl check` needs no compiler


@pytest.mark.parametrize("model", ["sd35", "lm"])
def test_a_missing_compiler_is_named(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ModelError, match=r"model.compile: on a CPU it needs a C\+\+ compiler, .* install g\+\+"):
        load_policy(build(request.getfixturevalue(model), tmp_path, compile=True))


def with_backend(backend: str) -> Callable[[nn.Module], None]:
    plain = nn.Module.compile
    return lambda self: plain(self, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "keys"),
    [("sd35", {}), ("sd35", {"quantize": "int8"}), ("sd35", {"gradient_checkpointing": True}), ("lm", {})],
)
def test_traced_blocks_have_the_numbers_of_plain_ones(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    keys: dict[str, Any],
) -> None:
    """Through torch.compile but for the generated code: guards, adapters switched on and off, snapshots, recomputation."""
    place = request.getfixturevalue(model)
    monkeypatch.setattr(nn.Module, "compile", with_backend("aot_eager"))
    compare(measure(build(place, tmp_path, **keys, compile=True)), measure(build(place, tmp_path, **keys)))


@pytest.mark.slow
def test_compiled_blocks_have_the_numbers_of_plain_ones(sd35: Path, tmp_path: Path) -> None:
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler")
    compare(measure(build(sd35, tmp_path, compile=True)), measure(build(sd35, tmp_path)))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
