from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from scipy import stats

from samplers import BaseDivergence, Decoding, Prompts, TextGuidance, generate, sample_keys
from samplers.text_guidance import blend
from tests.samplers.causal import (
    logits_after,
    next_logp,
    sequence_logp,
    sequence_number,
    sequences,
    tiny_gpt2,
    tiny_qwen2,
)

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1, 10, 2], [2], [2]]
DECODING = Decoding(max_new_tokens=6, temperature=1.5, eos=(3, 9))
# The models are float64 here; generate hands on logits of size 10 in float32.
EXACT = {"atol": 1e-5, "rtol": 0}


def keys(count: int) -> torch.Tensor:
    return sample_keys(seed=0, step=0, samples=range(count), use="token")


def pair(maker, vocabulary: int = 11):
    """Return (base, tuned) in float64."""
    return maker(vocabulary, seed=1).double(), maker(vocabulary, seed=2).double()


@pytest.fixture(scope="module", params=[tiny_qwen2, tiny_gpt2])
def models(request):
    return pair(request.param)


@contextmanager
def counted(model):
    """Record the number of tokens that each pass of a model reads."""
    passes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield passes
    finally:
        handle.remove()


def blended_logp(models, prompt, tokens, weight, temperature, first_tokens=0):
    """Return the blended log-probability of each token by whole passes: first divided and normalised, then blended."""
    found = []
    for j, token in enumerate(tokens):
        base, tuned = ((logits_after(m, [*prompt, *tokens[:j]]) / temperature).log_softmax(0) for m in models)
        w = 1.0 if j < first_tokens else weight
        found.append(((1 - w) * base + w * tuned).log_softmax(0)[token].item())
    return torch.tensor(found)


@pytest.mark.parametrize("weight", [-0.5, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("first_tokens", [0, 2])
def test_logp_is_the_formula_at_each_prefix(models, weight, first_tokens):
    base, tuned = models
    guidance = TextGuidance(base, weight, first_tokens=first_tokens)
    found = generate(tuned, PROMPTS, DECODING, keys(6), processors=(guidance,), batch=4)
    lengths = found.mask.sum(dim=1)
    for row, prompt in enumerate(PROMPTS):
        tokens = found.tokens[row, : lengths[row]].tolist()
        expected = blended_logp(models, prompt, tokens, weight, 1.5, first_tokens)
        torch.testing.assert_close(found.logp[row, : lengths[row]], expected, **EXACT)
    assert lengths.max() > 2


def sequence_logps(models, weight, length, temperature=1.0):
    """Return log-probabilities [4^J] of all sequences of four tokens: the base, blended at each prefix, and tilted as a whole.

    The tilt is pi_base exp(w r / beta) / Z with r / beta = log(pi_tuned / pi_base), for which pi_tuned is the optimum.
    """
    every = sequences(4, length)
    base, tuned = (next_logp(m, [1, 2], every, temperature) for m in models)
    blended = ((1 - weight) * base + weight * tuned).log_softmax(dim=2)
    whole, blended = sequence_logp(base, every), sequence_logp(blended, every)
    return whole, blended, (whole + weight * (sequence_logp(tuned, every) - whole)).log_softmax(dim=0)


def p_value(observed, logp, count):
    """Return the p-value of a chi-square test. Sequences that are expected less than five times form one class."""
    expected = logp.exp() * count
    frequent = expected >= 5
    classes = [torch.cat([x[frequent].double(), x[~frequent].sum()[None].double()]) for x in (observed, expected)]
    # The last class may be nearly empty; then it is left out on both sides.
    kept = classes[1] >= 5
    return stats.chisquare(classes[0][kept].numpy(), classes[1][kept].numpy(), sum_check=False).pvalue


def test_frequencies_follow_the_formula_and_not_the_tilted_sequences():
    """For more than one token the normalisers differ between prefixes."""
    models, count, weight = pair(tiny_qwen2, 4), 4096, 1.7
    _, blended, tilted = sequence_logps(models, weight, 3)
    assert blended.exp().sum() == pytest.approx(1, abs=1e-9)
    base, tuned = models
    guidance = TextGuidance(base, weight)
    found = generate(tuned, [[1, 2]] * count, Decoding(3), keys(count), processors=(guidance,), batch=count)
    observed = torch.bincount(sequence_number(found.tokens, 4), minlength=64)
    torch.testing.assert_close(
        found.logp.sum(dim=1).double(), blended[sequence_number(found.tokens, 4)], atol=3e-5, rtol=0
    )
    assert p_value(observed, blended, count) > 0.01
    assert (blended.exp() * (blended - tilted)).sum() > 0.02
    assert p_value(observed, tilted, count) < 1e-6


def test_at_weight_one_completions_are_the_tilted_sequences_of_any_length():
    """They are those of the tuned model. The divergence is measured, so that the base is evaluated and blended."""
    models, count = pair(tiny_qwen2, 4), 32
    *_, tilted = sequence_logps(models, 1.0, 3)
    base, tuned = models
    guidance = TextGuidance(base, 1.0, divergence=BaseDivergence())
    found = generate(tuned, [[1, 2]] * count, Decoding(3), keys(count), processors=(guidance,))
    assert torch.equal(found.tokens, generate(tuned, [[1, 2]] * count, Decoding(3), keys(count)).tokens)
    torch.testing.assert_close(
        found.logp.sum(dim=1).double(), tilted[sequence_number(found.tokens, 4)], atol=3e-5, rtol=0
    )


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_one_token_is_the_tilted_distribution(weight):
    """With a reward of its own: tuned = base exp(r / beta) / Z, and at w base exp(w r / beta) / Z."""
    base, tuned = pair(tiny_gpt2, 4)
    tilt = torch.tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64)  # r / beta
    tuned.load_state_dict(base.state_dict())
    tuned.lm_head.register_forward_hook(lambda module, args, logits: logits + tilt)
    expected = (logits_after(base, [1, 2]) + weight * tilt).log_softmax(dim=0).float()
    guidance = TextGuidance(base, weight)
    found = generate(tuned, [[1, 2]] * 200, Decoding(1), keys(200), processors=(guidance,), batch=200)
    assert len(found.tokens.unique()) >= 3  # of four probabilities, which determine the last
    torch.testing.assert_close(found.logp, expected[found.tokens], **EXACT)


def test_weights_0_and_1_are_the_models_themselves(models):
    base, tuned = models
    for weight, alone in ((0.0, base), (1.0, tuned)):
        expected = generate(alone, PROMPTS, DECODING, keys(6))
        found = generate(tuned, PROMPTS, DECODING, keys(6), processors=(TextGuidance(base, weight),))
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.logp, expected.logp, **EXACT)


def test_passes_of_the_base(models):
    base, tuned = models
    decoding = Decoding(6)
    expected = {
        (1.0, 0, False): [],
        (2.0, 6, False): [],
        (2.0, 0, False): [3, 1, 1, 1, 1, 1],
        (2.0, 4, False): [7, 1],  # a prompt of 3 and the 4 first tokens in one pass
        (1.0, 0, True): [3, 1, 1, 1, 1, 1],
        (2.0, 0, True): [3, 1, 1, 1, 1, 1],  # measuring costs nothing more here
    }
    for (weight, first_tokens, measured), passes in expected.items():
        divergence = BaseDivergence() if measured else None
        guidance = TextGuidance(base, weight, first_tokens=first_tokens, divergence=divergence)
        with counted(base) as found:
            generate(tuned, PROMPTS[:3], decoding, keys(3), processors=(guidance,))
        assert found == passes, (weight, first_tokens, measured)


def test_the_base_may_be_the_same_model_under_other_weights(models):
    base, tuned = models
    states: list[bool] = []

    @contextmanager
    def exchanged():
        kept = {name: p.data for name, p in tuned.named_parameters()}
        for name, p in base.named_parameters():
            tuned.get_parameter(name).data = p.data
        states.append(True)
        try:
            yield
        finally:
            for name, p in tuned.named_parameters():
                p.data = kept[name]
            states.append(False)

    expected = generate(tuned, PROMPTS, DECODING, keys(6), processors=(TextGuidance(base, 1.5),))
    found = generate(tuned, PROMPTS, DECODING, keys(6), processors=(TextGuidance(tuned, 1.5, exchanged),))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.logp, expected.logp)
    assert states[-1] is False
    assert len(states) > 2


def test_the_base_of_an_adapter_is_the_model_with_the_adapter_off():
    from peft import LoraConfig, get_peft_model

    base = tiny_qwen2(seed=1).double()
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(tiny_qwen2(seed=1).double(), adapter).double().eval()
    expected = generate(tuned, PROMPTS, DECODING, keys(6), processors=(TextGuidance(base, 1.5),))
    found = generate(tuned, PROMPTS, DECODING, keys(6), processors=(TextGuidance(tuned, 1.5, tuned.disable_adapter),))
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logp, expected.logp, **EXACT)
    alone = generate(tuned, PROMPTS, DECODING, keys(6))
    assert (found.logp - alone.logp).abs().max() > 0.1


def test_samples_do_not_depend_on_their_batch(models):
    base, tuned = models
    order = [3, 0, 5, 2, 4, 1]
    several, one = BaseDivergence(), BaseDivergence()
    expected = generate(tuned, PROMPTS, DECODING, keys(6), processors=(TextGuidance(base, 1.5, divergence=one),))
    found = generate(
        tuned,
        [PROMPTS[i] for i in order],
        DECODING,
        keys(6)[order],
        processors=(TextGuidance(base, 1.5, divergence=several),),
        batch=2,
    )
    assert torch.equal(found.tokens, expected.tokens[order])
    torch.testing.assert_close(found.logp, expected.logp[order], **EXACT)
    torch.testing.assert_close(several.sums(6), one.sums(6)[order], **EXACT)
    assert one.tokens(6).tolist() == expected.mask.sum(dim=1).tolist()
    assert len(one.tokens(6).unique()) > 1, "some completions must end early"


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.7])
def test_divergence_is_that_of_whole_completions(weight):
    """Its mean over samples equals KL(pi_w || pi_base) by enumeration, at a temperature."""
    models, count, temperature = pair(tiny_qwen2, 4), 2048, 1.3
    base, tuned = models
    whole, blended, _ = sequence_logps(models, weight, 2, temperature)
    exactly = (blended.exp() * (blended - whole)).sum().item()
    measured = BaseDivergence()
    generate(
        tuned,
        [[1, 2]] * count,
        Decoding(2, temperature),
        keys(count),
        processors=(TextGuidance(base, weight, divergence=measured),),
        batch=count,
    )
    sums = measured.sums(count)
    error = sums.std().item() / count**0.5
    assert sums.mean().item() == pytest.approx(exactly, abs=3 * error + 1e-5)
    assert (measured.tokens(count) == 2).all()
    assert (exactly > 0.1) == (weight > 0)
    assert error < 0.05


def test_tokens_of_probability_0_count_0():
    """(3/4, 1/4, 0) against (1/2, 1/2, 0), at a temperature that halves the logits: 3/4 log 3/2 - 1/4 log 2."""
    prompts = Prompts(torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([0]), Decoding(1, temperature=2.0))
    measured = BaseDivergence()
    guided, base = (2 * torch.tensor([[*p, 0.0]]).log() for p in ((0.75, 0.25), (0.5, 0.5)))
    measured.add(prompts, prompts.tokens, base, guided)
    assert measured.sums(1).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-6)


def test_greedy_measures_at_temperature_one(models):
    base, tuned = models
    measured = BaseDivergence()
    greedy = Decoding(1, 0.0)
    generate(tuned, [[1, 2]], greedy, keys(1), processors=(TextGuidance(base, 1.0, divergence=measured),))
    log_base, log_tuned = (logits_after(m, [1, 2]).log_softmax(0) for m in models)
    expected = (log_tuned.exp() * (log_tuned - log_base)).sum().item()
    assert measured.sums(1).item() == pytest.approx(expected, abs=1e-5)


def test_blend_by_hand():
    base, tuned = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    assert blend(base, tuned, 3.0).tolist() == [[3.0, -4.0]]
    assert torch.equal(blend(base, tuned, 0.0), base)
    assert torch.equal(blend(base, tuned, 1.0), tuned)


def test_refusals():
    base, tuned = tiny_qwen2(11), tiny_qwen2(12)
    with pytest.raises(ValueError, match=r"base model has logits for 11 tokens, the tuned one for 12"):
        generate(tuned, [[1]], Decoding(1), keys(1), processors=(TextGuidance(base, 2.0),))
    for wrong in ({"weight": float("nan")}, {"weight": 1.0, "first_tokens": -1}):
        with pytest.raises(ValueError, match="finite weight and first_tokens of 0 or more"):
            TextGuidance(base, **wrong)
    base.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing drops its cache"):
        generate(tiny_qwen2(11), [[1]], Decoding(1), keys(1), processors=(TextGuidance(base, 2.0),))
