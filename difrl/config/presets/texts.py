"""Presets of language models: policy gradients on tokens, and image methods without a published form for text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difrl.config.presets.preset import Preset

OLD_IS_EVALUATED: Mapping[str, Any] = {
    "likelihood": {"kind": "tokens", "old": "recompute"},
    "snapshots": {"old": {"decay": 0.0}},
}
"""Settings under which ℓ_old comes from the pass that training makes, so that ρ is 1 to the last bit before an update.

The ℓ that generation records differs by rounding. In bfloat16 that is up to 0.04 a token, and published ranges are as narrow
as 3e-4 (GSPO).
"""


def _tokens(
    *, clip: tuple[float, float] = (0.2, 0.2), std: str = "group", aggregation: str = "decision", **more: Any
) -> dict[str, Any]:
    """Return the common settings of policy gradients on tokens: a clipped surrogate, the group mean as baseline, no anchor."""
    return {
        **OLD_IS_EVALUATED,
        "objective": {"kind": "clipped", "clip_low": clip[0], "clip_high": clip[1]},
        "anchors": [],
        "advantage": {"baseline": "mean", "std": std},
        "train": {"aggregation": aggregation},
        **more,
    }


TEXT_PRESETS: Mapping[str, Preset] = {
    "grpo": Preset(
        summary="GRPO: a clipped policy gradient on tokens, with rewards standardised within the group of a prompt",
        source="2402.03300",
        # Section 4.2: beta = 0.04 and one update a rollout. The KL is k3 in the loss, and every sample has equal weight
        # regardless of its length (eq. 3, 4). The authors' code (deepseek-ai/DeepSeek-Math, 2024-04-15) has evaluations only,
        # and the paper has no value of epsilon; 0.2 is that of huggingface/trl, trl/trainer/grpo_config.py, 2026-07-23, whose
        # beta is 0.
        settings=_tokens(
            aggregation="sample", anchors=[{"to": "base", "divergence": "k3", "coefficient": 0.04, "place": "loss"}]
        ),
    ),
    "dr_grpo": Preset(
        summary="Dr.GRPO: GRPO without its two biases: no standard deviation, no division by the length of a text",
        source="2503.20783",
        # Qwen2.5-Math-7B of sail-sg/understand-r1-zero, examples/qwen2.5-math-7b.sh and its training script, 2025-07-01: no KL,
        # and sums over a text divided by the maximum length. The clip range is the default of the framework (sail-sg/oat,
        # oat/algorithms/ppo.py, 2025-10-31). No value differs.
        settings=_tokens(std="none", aggregation="length"),
    ),
    "dapo": Preset(
        summary="DAPO: a higher upper clip bound, equal weight for tokens, prompts drawn again until rewards differ",
        source="2503.14476",
        # run_dapo_qwen2.5_32b.sh of volcengine/verl (recipe/dapo, commit e2e729f), the authors' framework, clips twice: at 10
        # where an advantage is negative. Its weight decay is 0.1 (train.weight_decay). The fourth part, a soft penalty of
        # texts that are almost too long, is the reward `length`.
        settings=_tokens(
            objective={"kind": "clipped", "clip_low": 0.2, "clip_high": 0.28, "clip_dual": 10.0},
            collect={"max_draws": 10},
        ),
    ),
    "rloo": Preset(
        summary="RLOO: REINFORCE on whole texts, with the mean of the prompt's other texts as baseline and the KL in the reward",
        source="2402.14740",
        # Appendix C, summaries (TL;DR): beta = 0.03, two updates a rollout; 0.10 for dialogues. A text is one action, nothing
        # is clipped, and the KL is the k1 of a text. The first author announced the trainer of huggingface/trl. What differs in
        # trl/trainer/rloo_trainer.py, 2026-07-20: ratios of texts are clipped at 0.2, and beta is 0.05 by default.
        settings={
            **OLD_IS_EVALUATED,
            "objective": {"kind": "clipped", "clip_low": None, "clip_high": None, "decisions": "sum"},
            "anchors": [{"to": "base", "divergence": "k1", "coefficient": 0.03, "place": "reward"}],
            "advantage": {"baseline": "leave_one_out", "std": "none"},
        },
    ),
    "bnpo": Preset(
        summary="BNPO: rewards of 0 and 1 divided by a Beta density fitted to the success rates of the prompts",
        source="2506.02864",
        # Qwen2.5-Math-7B of changyi7231/BNPO, recipe/bnpo/run.sh and recipe/bnpo/src/bnpo_ray_trainer.py, 2025-06-07. They sum
        # over the tokens of a text and average over texts, as `length` up to a factor that AdamW cancels. What differs: where
        # an advantage is negative they also clip at 10 (clip_dual), without effect, as a rollout has one update.
        settings=_tokens(clip=(0.2, 0.28), std="beta", aggregation="length"),
    ),
    "gspo": Preset(
        summary="GSPO: GRPO with the ratio and clipping of a whole text: the geometric mean over its tokens",
        source="2507.18071",
        # Section 5.1: the clip range, for four updates a rollout. No code of the authors was found; the range is also in
        # examples/gspo_trainer/test_gspo_3b_math.sh of volcengine/verl, 2025-12-04, without a KL. What differs there: AdamW has
        # a weight decay of 0.1 (train.weight_decay).
        settings=_tokens(
            objective={"kind": "clipped", "clip_low": 3e-4, "clip_high": 4e-4, "decisions": "mean"},
        ),
    ),
    "crd_text": Preset(
        summary="Centred reward distillation on texts: their log-ratios regressed on rewards, both centred in a group",
        source="2603.14128",
        # Published for images. Only the sum over tokens is the log-likelihood of a text, so the sum precedes the square.
        # The anchor has no guidance and is the KL of full distributions. Snapshots and numbers are those of crd.
        settings={
            "rollout": {"snapshot": "sampler"},
            "likelihood": {"kind": "tokens", "old": "recompute"},
            "objective": {"kind": "centred", "beta": 1.0, "bound": 5.0, "decisions": "sum"},
            "snapshots": {
                "old": {"decay": {"kind": "linear", "start": 0.25, "end": 0.999, "steps": 149.8}},
                "sampler": {"decay": {"kind": "linear", "start": 0.0, "end": 0.999, "steps": 133.2, "hold": 75}},
            },
            "anchors": [
                {
                    "to": "base",
                    "divergence": "reverse_kl",
                    "coefficient": {"kind": "reward_adaptive", "value": 0.1, "floor": 1e-4, "limit": 5.0},
                }
            ],
            "advantage": {"baseline": "mean", "std": "global", "clip": 5.0},
        },
    ),
    "grpo_guard_text": Preset(
        summary="GRPO-Guard on tokens: log-ratios centred by the exact KL from old, so that clipping takes effect",
        source="2510.22319",
        # Published for images. The scale of a token is 1 and its bias KL(old || theta) of full distributions, so the old
        # weights are evaluated again; `bias: batch` estimates it from recorded values. The clip range is that of tokens.
        settings=_tokens(
            objective={"kind": "ratio_normalised", "clip_low": 0.2, "clip_high": 0.2, "bias": "closed_form"},
        ),
    ),
    "clip_cov": Preset(
        summary="Clip-Cov: tokens with a large covariance of log-probability and advantage are left out of the gradient",
        source="2505.22617",
        # recipe/dapo/7b_clip_cov.sh of PRIME-RL/Entropy-Mechanism-of-RL, 2025-06-26. Its clip_ratio_c has no effect there. What
        # differs: the authors draw the tokens at random, where the preset weights them by the probability of being drawn.
        settings=_tokens(
            objective={
                "kind": "clip_cov",
                "clip_low": 1.0,
                "clip_high": 1.0,
                "share": 2e-4,
                "lowest": 1.0,
                "highest": 5.0,
            }
        ),
    ),
    "kl_cov": Preset(
        summary="KL-Cov: a KL to old on the tokens with the largest covariance of log-probability and advantage",
        source="2505.22617",
        # recipe/dapo/7b_kl_cov.sh of PRIME-RL/Entropy-Mechanism-of-RL, 2025-06-26; for 32B the share is 2e-4. Recorded
        # likelihoods differ from those of theta by rounding errors, whose sign would determine the gradient of the penalty.
        settings=_tokens(objective={"kind": "kl_cov", "share": 2e-3, "coefficient": 1.0}),
    ),
    "nsr": Preset(
        summary="NSR: only samples with a negative reward count, so that no single answer is made more likely",
        source="2506.01347",
        # advantage="negative" of TianHongZXY/RLVR-Decomposed, run_qwen2.5-math-7b_psr_nsr.sh and verl/trainer/ppo/core_algos.py,
        # 2025-06-01. For rewards of +1 and -1, which serve as advantages; theirs are 1 and 0, and 1 is subtracted. What
        # differs: by defaults of their copy of verl, the loss has an entropy bonus of 0.001, and AdamW a weight decay of 0.01
        # (train.weight_decay).
        settings=_tokens(advantage={"baseline": "none", "std": "none", "positive": 0.0}),
    ),
    "w_reinforce": Preset(
        summary="W-REINFORCE: NSR, with positive rewards at a tenth of their weight",
        source="2506.01347",
        # advantage="weighted" with positive_advantage_weight = 0.1 in the script of nsr, 2025-06-01; the same differs.
        settings=_tokens(advantage={"baseline": "none", "std": "none", "positive": 0.1}),
    ),
}
