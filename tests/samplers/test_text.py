from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy import stats

from samplers import Completions, Decoding, Prompts, generate, gumbel, sample_keys
from samplers.text import _cut_at_end, perturb_logits
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
DECODING = Decoding(max_new_tokens=6, temperature=1.5, eos=(3, 9), pad=0)
# Two orders of summing float32 numbers of size 10 over a few thousand parameters.
ROUNDING = {"atol": 2e-5, "rtol": 0}


def keys(count: int) -> torch.Tensor:
    return sample_keys(seed=0, step=0, samples=range(count), use="token")


@pytest.fixture(scope="module", params=[tiny_qwen2, tiny_gpt2])
def model(request):
    return request.param()


def plain_loop(model, prompt, decoding, key):
    """Return tokens and log-probabilities by a loop of whole passes for one sample, without cache or padding."""
    tokens, logp = [], []
    for position in range(decoding.max_new_tokens):
        scaled = logits_after(model, [*prompt, *tokens]) / decoding.temperature
        token = int((scaled + gumbel(key[None], position, len(scaled))[0].double()).argmax())
        tokens.append(token)
        logp.append(scaled.log_softmax(dim=0)[token].item())
        if token in decoding.eos:
            break
    return tokens, logp


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_generate_equals_the_plain_loop(model, cache, batch):
    found = generate(model, PROMPTS, dataclasses.replace(DECODING, cache=cache), keys(6), batch=batch)
    assert found.tokens.dtype == torch.int64
    assert found.logp.dtype == torch.float32
    lengths = []
    for row, prompt in enumerate(PROMPTS):
        tokens, logp = plain_loop(model, prompt, DECODING, keys(6)[row])
        j = len(tokens)
        lengths.append(j)
        assert found.tokens[row].tolist() == tokens + [0] * (6 - j)
        assert found.mask[row].tolist() == [True] * j + [False] * (6 - j)
        torch.testing.assert_close(found.logp[row, :j], torch.tensor(logp), **ROUNDING)
        assert (found.logp[row, j:] == 0).all()
    assert len(set(lengths)) > 1, "some completions must end early and some not"


def test_samples_do_not_depend_on_their_batch(model):
    whole = generate(model, PROMPTS, DECODING, keys(6))
    order = [3, 0, 5, 2, 4, 1]
    moved = generate(model, [PROMPTS[i] for i in order], DECODING, keys(6)[order], batch=4)
    alone = generate(model, PROMPTS[3:4], DECODING, keys(6)[3:4])
    assert torch.equal(moved.tokens, whole.tokens[order])
    assert torch.equal(moved.mask, whole.mask[order])
    torch.testing.assert_close(moved.logp, whole.logp[order], **ROUNDING)
    assert torch.equal(alone.tokens[0], whole.tokens[3])
    torch.testing.assert_close(alone.logp[0], whole.logp[3], **ROUNDING)
    # Equal prompts and other keys: other samples.
    assert not torch.equal(whole.tokens[4], whole.tokens[5])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_distribution_is_the_models(temperature):
    """Three tokens of a vocabulary of four: the frequencies of all 64 sequences against their exact probabilities."""
    model, count, prompt = tiny_qwen2(4, seed=3), 4096, [1, 2]
    every = sequences(4, 3)
    logp = sequence_logp(next_logp(model, prompt, every, temperature), every)
    found = generate(model, [prompt] * count, Decoding(3, temperature), keys(count), batch=count)
    observed = torch.bincount(sequence_number(found.tokens, 4), minlength=64)
    torch.testing.assert_close(found.logp.sum(dim=1), logp[sequence_number(found.tokens, 4)].float(), **ROUNDING)
    frequent = logp.exp() * count >= 5  # chi-square's own condition; the others are one class
    expected = torch.cat([logp[frequent].exp(), logp[~frequent].exp().sum()[None]]) * count
    observed = torch.cat([observed[frequent], observed[~frequent].sum()[None]]).double()
    assert len(expected) > 10
    assert stats.chisquare(observed.numpy(), expected.numpy(), sum_check=False).pvalue > 0.01


def test_greedy(model):
    decoding = dataclasses.replace(DECODING, temperature=0.0, eos=())
    found = generate(model, PROMPTS, decoding, keys(6), batch=4)
    own = model.generate(torch.tensor([PROMPTS[3]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found.tokens[3].tolist() == own[0, 6:].tolist()
    assert torch.equal(found.tokens[4], found.tokens[5])
    assert found.mask.all()
    assert (found.logp == 0).all()


def test_the_models_own_settings_are_not_used():
    model, plain = tiny_qwen2(), tiny_qwen2()
    expected = generate(plain, PROMPTS, DECODING, keys(6))
    leaking = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.1,
        "min_p": 0.9,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "max_length": 3,
        "min_length": 30,
        "min_new_tokens": 6,
        "suppress_tokens": [1, 2, 4, 5],
        "begin_suppress_tokens": [7, 8],
        "forced_eos_token_id": 3,
        "sequence_bias": {(5,): -50.0},
        "penalty_alpha": 0.6,
        "eos_token_id": [1, 5],
        "pad_token_id": 7,
        "num_beams": 3,
        "return_dict_in_generate": True,
    }
    for name, value in leaking.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config
    found = generate(model, PROMPTS, DECODING, keys(6))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.logp, expected.logp)
    assert model.generation_config is kept
    assert kept.top_k == 1


def test_the_settings_of_a_wrapped_model_are_not_used():
    from peft import LoraConfig, get_peft_model

    inner = tiny_qwen2()
    expected = generate(tiny_qwen2(), PROMPTS, DECODING, keys(6))
    inner.generation_config.suppress_tokens = [1, 2, 4, 5]
    wrapped = get_peft_model(inner, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    kept = inner.generation_config
    assert torch.equal(generate(wrapped, PROMPTS, DECODING, keys(6)).tokens, expected.tokens)
    assert inner.generation_config is kept


def test_pad_may_be_an_end_token_and_an_end_token_may_be_in_a_prompt(model):
    expected = generate(model, PROMPTS, DECODING, keys(6))
    same = generate(model, PROMPTS, dataclasses.replace(DECODING, pad=3), keys(6), batch=6)
    assert 3 in PROMPTS[0]
    assert torch.equal(same.mask, expected.mask)
    assert torch.equal(same.tokens, torch.where(expected.mask, expected.tokens, 3))


def test_the_model_is_not_changed(model):
    with torch.enable_grad():
        found = generate(model, PROMPTS[:2], DECODING, keys(2))
    assert not found.logp.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_training_mode_is_left_alone_unless_it_would_lose_the_cache():
    model = tiny_qwen2().train()
    expected = generate(tiny_qwen2(), PROMPTS, DECODING, keys(6))
    assert torch.equal(generate(model, PROMPTS, DECODING, keys(6)).tokens, expected.tokens)
    assert model.training
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing drops its cache.*model\.eval\(\)"):
        generate(model, PROMPTS, DECODING, keys(6))
    assert torch.equal(generate(model.eval(), PROMPTS, DECODING, keys(6)).tokens, expected.tokens)


def test_processors_are_made_for_each_batch_and_act_before_the_temperature(model):
    seen: list[Prompts] = []

    def allow(prompts: Prompts):
        seen.append(prompts)
        last = prompts.tokens[:, -1:]

        def only_the_last_token_and_its_successor(tokens, scores):
            distance = torch.arange(scores.shape[1]) - last
            return torch.where((distance == 0) | (distance == 1), scores, -torch.inf)

        return only_the_last_token_and_its_successor

    found = generate(model, PROMPTS, DECODING, keys(6), processors=(allow,), batch=4)
    assert [prompts.rows.tolist() for prompts in seen] == [[1, 4, 5, 2], [0, 3]]
    assert seen[0].tokens.tolist() == [[0, 4], [0, 2], [0, 2], [5, 6]]
    assert seen[0].attention.tolist() == [[0, 1], [0, 1], [0, 1], [1, 1]]
    for row, prompt in enumerate(PROMPTS):
        assert set(found.tokens[row][found.mask[row]].tolist()) <= {prompt[-1], prompt[-1] + 1}
        pair = (logits_after(model, prompt) / 1.5)[prompt[-1] : prompt[-1] + 2].log_softmax(dim=0)
        first = found.logp[row, 0].double()
        torch.testing.assert_close(first, pair[found.tokens[row, 0] - prompt[-1]], **ROUNDING)


def test_draw_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    perturbed, logp = perturb_logits(logits, 2.0, keys(2), 4)
    torch.testing.assert_close(perturbed, torch.tensor([[1.0, 0.0], [0.0, 0.0]]) + gumbel(keys(2), 4, 2))
    winners = perturbed.argmax(dim=1)
    # softmax of (1, 0) is (0.7311, 0.2689); log 0.5 is -0.6931
    expected = torch.tensor([[-0.313262, -1.313262], [-0.693147, -0.693147]]).gather(1, winners[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, atol=1e-6, rtol=0)
    same, nothing = perturb_logits(logits, 0.0, keys(2), 4)
    assert same is logits
    assert nothing.tolist() == [0.0, 0.0]


def test_no_prompts_give_no_completions(model):
    found = generate(model, [], DECODING, keys(0))
    assert isinstance(found, Completions)
    assert found.tokens.shape == found.mask.shape == found.logp.shape == (0, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and 0"),
        ({"temperature": float("nan")}, "temperature must be finite and 0"),
        ({"temperature": float("inf")}, "temperature must be finite and 0"),
        ({"cache": "offloaded"}, "cache must be one of .*'offloaded'"),
        ({"pad": -100}, "lend one of its end tokens"),
        ({"eos": (3, -1)}, "must be token ids of 0 or more"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DECODING, **settings)


def test_bad_prompts_are_refused(model):
    fits = [1] * 26  # a context of 32, 6 to be generated
    assert generate(model, [fits], DECODING, keys(1)).mask.any()
    with pytest.raises(ValueError, match=r"prompt 1 has 27 tokens.*max_new_tokens=6.*context of 32 leaves room for 26"):
        generate(model, [[1], [1] * 27], DECODING, keys(2))
    with pytest.raises(ValueError, match=r"prompt 1 has no tokens.*BOS"):
        generate(model, [[1], []], DECODING, keys(2))
    with pytest.raises(ValueError, match=r"2 prompts need int64 keys of shape \(2,\), got torch\.int64 \(3,\)"):
        generate(model, [[1], [2]], DECODING, keys(3))
    with pytest.raises(ValueError, match=r"need int64 keys of shape \(1,\), got torch\.float32 \(1,\)"):
        generate(model, [[1]], DECODING, torch.zeros(1))
    with pytest.raises(ValueError, match="batch must be 1 or more"):
        generate(model, [[1]], DECODING, keys(1), batch=0)


def test_decoding_stops_when_all_have_ended():
    """Any end token ends a completion, here the second one; further passes would be wasted."""
    model, passes = tiny_qwen2(), []
    model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(1), with_kwargs=True)

    def end(prompts: Prompts):
        return lambda tokens, scores: torch.where(torch.arange(scores.shape[1]) == 9, scores, -torch.inf)

    found = generate(model, PROMPTS[:2], DECODING, keys(2), processors=(end,))
    assert found.mask.sum(dim=1).tolist() == [1, 1]
    assert len(passes) == 1


def test_tokens_after_the_end_may_be_anything():
    tokens, logp = torch.tensor([[9, 5], [5, 9]]), torch.tensor([[-1.0, torch.nan], [-2.0, -3.0]])
    found = _cut_at_end(tokens, logp, DECODING)
    assert found.tokens.tolist() == [[9, 0], [5, 9]]
    assert found.logp.tolist() == [[-1.0, 0.0], [-2.0, -3.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    model = tiny_qwen2()
    with torch.no_grad():
        model.lm_head.weight[4] = torch.nan
    with pytest.raises(ValueError, match=r"not finite for prompt 0 \(6 of 6 prompts\); its weights may have diverged"):
        generate(model, PROMPTS, dataclasses.replace(DECODING, temperature=temperature), keys(6))
