"""A language model as a policy: likelihoods, divergences and gradients against transformers and explicit sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from difrl.config import RunConfig
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import ALL, Decisions, NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.policy import LanguagePolicy
from difrl.training.cost.estimate import estimate
from tests.recipes import TEACHER, text_recipe
from tests.tiny_models import tiny_lm

KEY = NoiseKey(seed=3, step=5)
PROMPTS = [Prompt(text, {}) for text in ("1+2=", "30+4=", "5=", "12+34+5=", "7+7=", "0=")]
LORA = {"train": "lora", "lora": {"rank": 4}}
FULL = {"train": "full"}
MODELS = {"full": FULL, "lora": LORA}
T = 0.8
"""Temperature of sampling. It differs from 1, so a likelihood at another temperature fails the tests."""


def policy_of(path: Path, /, **sections: Any) -> LanguagePolicy:
    sections = {"generation": {"max_new_tokens": 5, "temperature": T}, **sections}
    return load_language_policy(text_recipe(path, **sections))


def drawn(policy: LanguagePolicy) -> tuple[Rollout, Decisions]:
    numbers = torch.arange(len(PROMPTS))
    rollout = policy.rollout(PROMPTS, numbers, numbers, KEY)
    return rollout, policy.decisions(rollout, KEY)


def moved(policy: LanguagePolicy, seed: int = 0) -> LanguagePolicy:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters.values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return policy


def pretrained(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def next_tokens(model: Any, policy: LanguagePolicy, rollout: Rollout, temperature: float = T) -> list[Tensor]:
    """Return log p [n, V] of the n tokens of every row: one row at a time, without padding, over the whole vocabulary."""
    found = []
    for prompt, tokens, mask in zip(
        rollout.prompts, rollout.replay_data["tokens"], rollout.replay_data["mask"], strict=True
    ):
        ids, own = policy.tokenizer.tokenize(prompt), tokens[mask].tolist()
        logits = model(input_ids=torch.tensor([[*ids, *own]]), use_cache=False).logits[0, len(ids) - 1 : -1]
        found.append((logits / temperature).log_softmax(dim=1))
    return found


def flat(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows)


def gradients(policy: LanguagePolicy, scalar: Tensor) -> Tensor:
    """Return the gradient of all trained parameters as one vector."""
    found = torch.autograd.grad(scalar, list(policy.parameters.values()), allow_unused=True)
    pairs = zip(policy.parameters.values(), found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def same_gradient(found: Tensor, expected: Tensor) -> None:
    """Compare up to float32 sums in another order, relative to the largest entry."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))
    assert expected.abs().max() > 1e-3


def test_log_probs_are_those_of_transformers_own_loss(lm: Path) -> None:
    policy = policy_of(lm, generation={"max_new_tokens": 5})
    rollout, decisions = drawn(policy)
    logp, model = policy.likelihoods(rollout, decisions).logp.detach(), pretrained(lm)
    for i, (prompt, mask) in enumerate(zip(rollout.prompts, decisions.mask, strict=True)):
        ids = policy.tokenizer.tokenize(prompt)
        whole = torch.tensor([[*ids, *rollout.replay_data["tokens"][i][mask].tolist()]])
        labels = whole.clone()
        labels[0, : len(ids)] = -100
        loss = float(model(input_ids=whole, labels=labels).loss.detach())
        assert -float(logp[i][mask].mean()) == pytest.approx(loss, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_what_was_recorded_is_what_is_evaluated(lm: Path, model: str) -> None:
    policy = moved(policy_of(lm, model=MODELS[model]))
    rollout, decisions = drawn(policy)
    assert policy.evaluations == decisions.mask.sum() < decisions.mask.numel()
    assert decisions.whole  # a sample's tokens are never cut apart
    found, every = (
        policy.likelihoods(rollout, decisions).logp.detach(),
        next_tokens(policy.network.model, policy, rollout),
    )
    chosen = flat(every).gather(1, rollout.replay_data["tokens"][decisions.mask][:, None])[:, 0].detach()
    torch.testing.assert_close(found[decisions.mask], chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.replay_data["log_prob"], found, rtol=1e-5, atol=1e-5)
    assert (found[~decisions.mask] == 0).all()


def test_rollouts_do_not_depend_on_the_batch(lm: Path) -> None:
    whole, _ = drawn(policy_of(lm, rollout={"batch": 6}))
    for batch in (1, 4):
        part, _ = drawn(policy_of(lm, rollout={"batch": batch}))
        assert part.texts == whole.texts
        assert torch.equal(part.replay_data["tokens"], whole.replay_data["tokens"])
        torch.testing.assert_close(part.replay_data["log_prob"], whole.replay_data["log_prob"], rtol=1e-5, atol=1e-5)
    one = policy_of(lm).rollout(PROMPTS[2:3], torch.tensor([2]), torch.tensor([2]), KEY)
    assert torch.equal(one.replay_data["tokens"][0], whole.replay_data["tokens"][2])
    assert len(set(whole.texts or ())) > 3


@pytest.mark.parametrize("model", MODELS)
def test_reference_samples_are_what_the_weights_of_then_write(lm: Path, model: str) -> None:
    """A second policy that was never trained draws the same at the temperature of sampling. The tokens are counted."""
    anchors = [{"to": "base", "divergence": "k3"}]
    policy, pretrained = moved(policy_of(lm, model=MODELS[model], anchors=anchors)), policy_of(lm)
    expected, own = drawn(pretrained)[0], drawn(policy)[0]
    before = policy.evaluations
    found = policy.reference(PROMPTS, torch.arange(len(PROMPTS)), KEY, "base")
    assert found.texts == expected.texts != own.texts
    assert policy.evaluations - before == int(expected.replay_data["mask"].sum())


def test_evaluations_have_a_temperature_of_their_own(lm: Path) -> None:
    """At 0 the key does not matter. By default it is the temperature of sampling, so equal keys give equal texts."""
    numbers, other = torch.arange(len(PROMPTS)), NoiseKey(KEY.seed + 1, KEY.step)
    greedy = policy_of(lm, eval={"temperature": 0.0})
    texts = [greedy.evaluation(PROMPTS, numbers, key).texts for key in (KEY, other)]
    drawn = [greedy.rollout(PROMPTS, numbers, numbers, key).texts for key in (KEY, other)]
    assert texts[0] == texts[1]
    assert drawn[0] != drawn[1]
    same = policy_of(lm)
    assert same.evaluation(PROMPTS, numbers, KEY).texts == same.rollout(PROMPTS, numbers, numbers, KEY).texts


ALPHA = 0.3
SUMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": lambda p, q: p * (p / q).log(),
    "forward_kl": lambda p, q: q * (q / p).log(),
    "jensen_shannon": lambda p, q: p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log(),
    "alpha": lambda p, q: (p ** (1 - ALPHA) * q**ALPHA - (1 - ALPHA) * p - ALPHA * q) / (ALPHA * (ALPHA - 1)),
    "hellinger": lambda p, q: (p.sqrt() - q.sqrt()).square() / 2,
    "total_variation": lambda p, q: (p - q).abs() / 2,
    "chi_squared": lambda p, q: (p - q).square() / q,
}
"""The terms of each divergence, summed over the vocabulary."""


def alpha_of(name: str) -> dict[str, float]:
    return {"alpha": ALPHA} if name == "alpha" else {}


@pytest.mark.parametrize("model", MODELS)
def test_divergences_are_sums_over_the_vocabulary(lm: Path, model: str) -> None:
    """Values and gradients agree with exact sums of probabilities that transformers gives for every row alone."""
    base = pretrained(lm)
    for name, terms in SUMS.items():
        anchors = [{"to": "base", "divergence": name, **alpha_of(name)}]
        policy = moved(policy_of(lm, model=MODELS[model], anchors=anchors))
        rollout, decisions = drawn(policy)
        found = policy.likelihoods(rollout, decisions)["divergence/base"]
        with torch.no_grad():
            q = flat(next_tokens(base, policy, rollout)).exp()
        expected = terms(flat(next_tokens(policy.network.model, policy, rollout)).exp(), q).sum(dim=1)
        # float32 sums of terms that cancel, over 15 tokens
        torch.testing.assert_close(
            found[decisions.mask], expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert expected.mean() > 1e-3
        same_gradient(gradients(policy, found.sum()), gradients(policy, expected.sum()))


def test_sampled_divergences_are_of_the_tokens_drawn(lm: Path) -> None:
    """The estimate is f(u)/u with the gradient f'(u) ∇log p; f comes from its terms, and f' from their derivative."""
    base = pretrained(lm)
    for name, terms in SUMS.items():
        anchors = [{"to": "base", "divergence": name, **alpha_of(name), "vocabulary": "sampled"}]
        policy = moved(policy_of(lm, anchors=anchors))
        rollout, decisions = drawn(policy)
        found = policy.likelihoods(rollout, decisions)["divergence/base"][decisions.mask]
        tokens = rollout.replay_data["tokens"][decisions.mask][:, None]
        log_p = flat(next_tokens(policy.network.model, policy, rollout)).gather(1, tokens)[:, 0]
        log_q = flat(next_tokens(base, policy, rollout)).detach().gather(1, tokens)[:, 0]
        u = (log_p - log_q).detach().requires_grad_()
        f = terms(u.exp(), torch.ones_like(u)) + _tangent(name) * (u.exp() - 1)
        slope = torch.autograd.grad(f.sum(), u)[0] * (-u).exp()
        torch.testing.assert_close(found.detach(), f.detach() * (-u).exp().detach(), rtol=1e-3, atol=1e-5)
        same_gradient(gradients(policy, found.sum()), gradients(policy, (slope.detach() * log_p).sum()))


@pytest.mark.parametrize("model", MODELS)
def test_bias_is_the_kl_from_old_to_new_distributions(lm: Path, model: str) -> None:
    """The bias is Σ_v old(v) (log old(v) − log θ(v)) of every token, with gradient in θ; KL is not symmetric."""
    policy = policy_of(
        lm,
        model=MODELS[model],
        likelihood={"kind": "tokens", "old": "recompute"},
        objective={"kind": "ratio_normalised"},
        snapshots={"old": {"decay": 0.0}},
    )
    rollout, decisions = drawn(policy)
    lik = moved(policy).likelihoods(rollout, decisions)
    log_q = flat(next_tokens(pretrained(lm), policy, rollout)).detach()
    log_p = flat(next_tokens(policy.network.model, policy, rollout))
    expected = (log_q.exp() * (log_q - log_p)).sum(dim=1)
    torch.testing.assert_close(lik["bias"][decisions.mask], expected, rtol=1e-4, atol=2e-6)
    same_gradient(gradients(policy, lik["bias"].sum()), gradients(policy, expected.sum()))
    assert torch.equal(lik["scale"], decisions.mask.float())


def _tangent(name: str) -> float:
    """Return the slope of the line that gives f(1) = f'(1) = 0. Over a vocabulary the line sums to 0."""
    return {"reverse_kl": -1.0, "forward_kl": 1.0}.get(name, 0.0)


def test_chunks_change_neither_numbers_nor_gradients(lm: Path) -> None:
    found = []
    for chunk in (1, 4, 1000):
        anchors = [{"to": "base", "divergence": "jensen_shannon"}]
        policy = moved(policy_of(lm, likelihood={"kind": "tokens", "chunk": chunk}, anchors=anchors))
        lik = policy.likelihoods(*drawn(policy))
        total = lik["divergence/base"].sum() + lik.logp.square().sum()
        found.append((lik.logp.detach(), lik["divergence/base"].detach(), gradients(policy, total)))
    for logp, divergence, gradient in found[1:]:
        torch.testing.assert_close(logp, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(divergence, found[0][1], rtol=1e-5, atol=1e-6)
        same_gradient(gradient, found[0][2])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("models") / "teacher", layers=1, seed=1)


def test_a_teacher_is_an_anchor_that_stays_as_it_is(lm: Path, teacher: Path) -> None:
    anchors = [{"to": "t", "divergence": "forward_kl"}, {"to": "base", "divergence": "k3"}]
    policy = moved(policy_of(lm, teachers={"t": {"path": str(teacher)}}, anchors=anchors))
    rollout, decisions = drawn(policy)
    found = policy.likelihoods(rollout, decisions)["divergence/t"]
    log_p = flat(next_tokens(policy.network.model, policy, rollout))
    log_q = flat(next_tokens(pretrained(teacher), policy, rollout)).detach()
    expected = (log_q.exp() * (log_q - log_p)).sum(dim=1)
    torch.testing.assert_close(found[decisions.mask], expected, rtol=1e-4, atol=2e-6)
    found.sum().backward()
    assert all(p.grad is None for p in policy.teachers["t"].model.parameters())
    assert policy.references_equal_to_policy() == []


def test_a_teacher_of_another_vocabulary_is_refused(lm: Path, tmp_path: Path) -> None:
    other = tiny_lm(tmp_path / "other")
    model = pretrained(other)
    model.resize_token_embeddings(17)
    model.save_pretrained(other)
    assert json.loads((other / "config.json").read_text())["vocab_size"] == 17
    with pytest.raises(ModelError, match=r"teachers\.t: found 17 tokens, expected the 15 of the model"):
        policy_of(lm, teachers={"t": {"path": str(other)}}, anchors=[{"to": "t", "divergence": "k3"}])


@pytest.mark.parametrize("load", [load_language_policy, estimate])
def test_a_teacher_that_is_not_there_is_named_by_its_key(lm: Path, tmp_path: Path, load: Callable[[Any], Any]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text("1+1=")
    for path, said in (("./nowhere", "no folder './nowhere'"), (str(tmp_path / "empty"), ".*empty'? cannot be ")):
        config = text_recipe(
            lm,
            data={"train": str(tmp_path / "prompts.txt"), "evaluation": None},
            teachers={"t": {"path": path}},
            anchors=[{"to": "t", "divergence": "k3"}],
        )
        with pytest.raises(ModelError, match=rf"^teachers\.t\.path: {said}"):
            load(config)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_passes_under_other_weights_leave_the_gradient_alone(
    lm: Path, model: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside likelihoods() weights are exchanged for anchors before θ's pass, but not after it or in its backward pass."""
    trained = {**MODELS[model], "gradient_checkpointing": checkpointing}
    snapshots = {"old": {"decay": 0.0}, "ema": {"decay": 0.5}}
    anchors = [{"to": "base", "divergence": "jensen_shannon"}, {"to": "ema", "divergence": "k3"}]
    sections: dict[str, Any] = {"likelihood": {"kind": "tokens", "old": "recompute"}, "snapshots": snapshots}
    policy = moved(policy_of(lm, model=trained, anchors=anchors, **sections))
    alone = moved(policy_of(lm, model=FULL if model == "full" else LORA))
    rollout, decisions = drawn(policy)
    calls: list[str] = []
    use, hidden = policy.snapshots.use, type(policy.network).hidden

    def seen(name: str) -> Any:
        calls.append(name)
        return use(name)

    def passed(network: Any, *arguments: Any) -> Tensor:
        calls.append("graph" if torch.is_grad_enabled() else "pass")
        return hidden(network, *arguments)

    monkeypatch.setattr(policy.snapshots, "use", seen)
    monkeypatch.setattr(type(policy.network), "hidden", passed)
    lik = policy.likelihoods(rollout, decisions)
    assert calls.count("graph") == 1
    assert calls[-1] == "graph"
    assert {"base", "ema", "old"} <= set(calls[: calls.index("current")])
    before = {name: p.data_ptr() for name, p in policy.parameters.items()}
    found = gradients(policy, lik.logp.sum())
    assert calls[-1] == "graph"
    assert {name: p.data_ptr() for name, p in policy.parameters.items()} == before
    expected = gradients(alone, alone.likelihoods(rollout, decisions).logp.sum())
    same_gradient(found, expected)


@pytest.mark.parametrize("centred", [(), ("t",), ("t", "base")], ids=str)
def test_penalties_are_log_ratios_and_may_be_centred(lm: Path, teacher: Path, centred: tuple[str, ...]) -> None:
    """The penalty is k1 of the tokens less KL(sampler ‖ anchor) over the vocabulary. Each anchor is centred or not."""
    k1 = {"divergence": "k1", "place": "decision"}
    anchors = [{"to": name, **k1, "centred": name in centred} for name in ("t", "base")]
    policy = moved(policy_of(lm, teachers={"t": {"path": str(teacher)}}, anchors=anchors))
    rollout, decisions = drawn(policy)
    (found,) = policy.penalties(rollout, decisions, [ALL])
    log_p = flat(next_tokens(policy.network.model, policy, rollout)).detach()
    tokens = rollout.replay_data["tokens"][decisions.mask][:, None]
    for name, path in (("t", teacher), ("base", lm)):
        log_q = flat(next_tokens(pretrained(path), policy, rollout)).detach()
        k = (log_p - log_q).gather(1, tokens)[:, 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        charge, divergence = (k - kl, kl) if name in centred else (k, k)
        torch.testing.assert_close(found[name].amount[decisions.mask], charge, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].divergence[decisions.mask], divergence, rtol=1e-4, atol=1e-5)
        assert (found[name].amount[~decisions.mask] == 0).all()


def every_text(policy: LanguagePolicy, length: int, vocabulary: int = 15) -> tuple[Rollout, Decisions, Tensor]:
    """Return a rollout of all sequences of this many tokens after one prompt, and their probabilities [N].

    The end is a token like any other here, so that all sequences have one length and the probabilities sum to 1.
    """
    tokens = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).reshape(-1, length)
    count = len(tokens)
    tape = {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}
    rollout = Rollout((PROMPTS[0],) * count, torch.zeros(count).long(), torch.arange(count), tape)
    logp = policy.recompute_logprobs(rollout, policy.decisions(rollout, KEY))
    rollout = Rollout(rollout.prompts, rollout.groups, rollout.samples, {**tape, "log_prob": logp})
    return rollout, policy.decisions(rollout, KEY), logp.double().sum(dim=1).exp()


def distilled(lm: Path, teacher: Path, centred: bool) -> LanguagePolicy:
    anchor = {"to": "t", "divergence": "k1", "place": "decision", "centred": centred}
    return moved(policy_of(lm, teachers={"t": {"path": str(teacher)}}, anchors=[anchor]))


def test_centring_leaves_the_expected_gradient_of_two_tokens(lm: Path, teacher: Path) -> None:
    """Return Σ_y p(y) Σ_j amount_j ∇ℓ_j over all 225 texts of two tokens."""
    found = []
    for centred in (False, True):
        policy = distilled(lm, teacher, centred)
        rollout, decisions, p = every_text(policy, 2)
        assert float(p.sum()) == pytest.approx(1, abs=1e-5)
        (penalties,) = policy.penalties(rollout, decisions, [ALL])
        charge = penalties["t"].amount
        logp = policy.likelihoods(rollout, decisions).logp
        found.append((charge, gradients(policy, (p.float()[:, None] * charge * logp).sum())))
    same_gradient(found[1][1], found[0][1])
    assert (found[0][0] - found[1][0]).abs().min() > 0.01  # the charges themselves differ everywhere


def test_centring_lowers_the_variance_of_the_gradient(lm: Path, teacher: Path) -> None:
    """Return Σ_v p(v) ‖amount_v ∇ℓ_v‖² − ‖mean‖² of a first token, over the vocabulary."""
    spread = []
    for centred in (False, True):
        policy = distilled(lm, teacher, centred)
        rollout, decisions, p = every_text(policy, 1)
        (penalties,) = policy.penalties(rollout, decisions, [ALL])
        charge = penalties["t"].amount
        rows = policy.likelihoods(rollout, decisions).logp * charge
        each = torch.stack(
            [torch.cat([g.flatten() for g in _of(policy, row)]) for row in rows[:, 0]]  # 15 backward passes
        ).double()
        mean = (p[:, None] * each).sum(dim=0)
        spread.append(float((p * each.square().sum(dim=1)).sum() - mean.square().sum()))
    assert spread[1] < 0.9 * spread[0]


def _of(policy: LanguagePolicy, scalar: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar, list(policy.parameters.values()), retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize(
    ("anchor", "problem"),
    [
        ({"place": "reward"}, "a token also affects the expectations of later tokens"),
        ({"place": "loss", "divergence": "k3"}, "set place: decision, or centred: false"),
    ],
)
def test_only_decisions_charged_alone_can_be_centred(anchor: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        text_recipe("nowhere", anchors=[{"to": "base", "divergence": "k1", "centred": True, **anchor}])


def test_no_reward_is_optimised_in_distillation() -> None:
    """A reward of weight 0 is reported, and its groups never differ."""
    silent = [{"import": "tests.fakes:Ones", "weight": 0.0}]
    anchor = {"to": "teacher", "divergence": "k1", "place": "decision"}
    assert isinstance(text_recipe("nowhere", rewards=silent, anchors=[anchor], **TEACHER), RunConfig)
    with pytest.raises(ValueError, match="drawn again until their rewards differ"):
        text_recipe("nowhere", rewards=silent, anchors=[anchor], collect={"max_draws": 2}, **TEACHER)
