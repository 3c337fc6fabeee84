"""Presets of language models: policy gradients on tokens, and image methods that nobody has published for text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difrl.config.presets.preset import Preset


def _tokens(
    *, clip: tuple[float, float] = (0.2, 0.2), std: str = "group", aggregation: str = "decision", **more: Any
) -> dict[str, Any]:
    """What the policy gradients on tokens share: a clipped surrogate, the group's mean as baseline, no anchor."""
    return {
        "likelihood": {"kind": "tokens", "old": "recorded"},
        "objective": {"kind": "clipped", "clip_low": clip[0], "clip_high": clip[1]},
        "anchors": [],
        "advantage": {"baseline": "mean", "std": std},
        "train": {"aggregation": aggregation},
        **more,
    }


_OLD_IS_EVALUATED: Mapping[str, Any] = {
    "likelihood": {"kind": "tokens", "old": "recompute"},
    "snapshots": {"old": {"decay": 0.0}},
}
"""The weights of the rollout speak again in every update, with their whole distributions."""


TEXTS: Mapping[str, Preset] = {
    "grpo": Preset(
        summary="GRPO: a clipped policy gradient on tokens, rewards standardised within the group of a prompt",
        source="2402.03300",
        likelihood="tokens",
        objective="clipped",
        anchor="base",
        advantage="group-std",
        # The KL is the k3 of the loss, and every sample counts alike, however long (eq. 3, 4).
        settings=_tokens(
            aggregation="sample", anchors=[{"to": "base", "divergence": "k3", "coefficient": 0.04, "place": "loss"}]
        ),
    ),
    "dr_grpo": Preset(
        summary="Dr.GRPO: GRPO without the two biases, no standard deviation and no division by a text's length",
        source="2503.20783",
        likelihood="tokens",
        objective="clipped",
        anchor="none",
        advantage="none-std",
        settings=_tokens(std="none", aggregation="length"),
    ),
    "dapo": Preset(
        summary="DAPO: more room to rise than to fall, tokens count alike, prompts drawn again until samples differ",
        source="2503.14476",
        likelihood="tokens",
        objective="clipped",
        anchor="none",
        advantage="group-std",
        # The fourth part, a soft punishment of texts that are nearly too long, is a reward: `length`.
        settings=_tokens(clip=(0.2, 0.28), collect={"max_draws": 10}),
    ),
    "rloo": Preset(
        summary="RLOO: REINFORCE on whole texts, each against the mean of the prompt's others, the KL in the reward",
        source="2402.14740",
        likelihood="tokens",
        objective="clipped",
        anchor="base",
        advantage="none-std",
        # A text is one action and an update follows every rollout, so nothing is clipped. The KL is a text's k1.
        settings={
            "likelihood": {"kind": "tokens", "old": "recorded"},
            "objective": {"kind": "clipped", "clip_low": None, "clip_high": None, "decisions": "sum"},
            "anchors": [{"to": "base", "divergence": "k1", "coefficient": 0.03, "place": "reward"}],
            "advantage": {"baseline": "leave_one_out", "std": "none"},
        },
    ),
    "bnpo": Preset(
        summary="BNPO: rewards of 0 and 1 divided by a Beta density fitted to the success rates of the prompts",
        source="2506.02864",
        likelihood="tokens",
        objective="clipped",
        anchor="none",
        advantage="beta-std",
        # The authors' code sums a text's tokens and averages over texts: `length`, up to a factor that AdamW undoes.
        settings=_tokens(clip=(0.2, 0.28), std="beta", aggregation="length"),
    ),
    "gspo": Preset(
        summary="GSPO: GRPO whose ratio, and so whose clipping, is of a whole text: the geometric mean of its tokens'",
        source="2507.18071",
        likelihood="tokens",
        objective="clipped",
        anchor="none",
        advantage="group-std",
        settings=_tokens(
            objective={"kind": "clipped", "clip_low": 3e-4, "clip_high": 4e-4, "decisions": "mean"},
        ),
    ),
    "crd_text": Preset(
        summary="Centred reward distillation on texts: their log-ratios regressed on rewards, both centred in a group",
        source="2603.14128",
        likelihood="tokens",
        objective="centred",
        anchor="base",
        advantage="global-std",
        # Published for images. Only the sum over tokens is a text's log-likelihood, so it comes before the square; the
        # anchor has no guidance to be under, and is the KL of whole distributions. Snapshots and numbers are crd's.
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
        summary="GRPO-Guard on tokens: ratios whose log is centred by the exact KL from old, so that clipping acts",
        source="2510.22319",
        likelihood="tokens",
        objective="ratio_normalised",
        anchor="none",
        advantage="group-std",
        # Published for images. A token's scale is 1 and its bias KL(old || theta) of whole distributions, for which the
        # old weights speak again; `bias: batch` estimates it from what was recorded. The clip range is that of tokens.
        settings=_tokens(
            objective={"kind": "ratio_normalised", "clip_low": 0.2, "clip_high": 0.2, "bias": "closed_form"},
            **_OLD_IS_EVALUATED,
        ),
    ),
    "clip_cov": Preset(
        summary="Clip-Cov: tokens whose covariance of log-probability and advantage is large leave the gradient",
        source="2505.22617",
        likelihood="tokens",
        objective="clip_cov",
        anchor="none",
        advantage="group-std",
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
        summary="KL-Cov: tokens whose covariance of log-probability and advantage is largest are held to old",
        source="2505.22617",
        likelihood="tokens",
        objective="kl_cov",
        anchor="none",
        advantage="group-std",
        # The share is that of the 7B model; for 32B it is 2e-4. Recorded likelihoods differ from theta's by rounding, which
        # the penalty would take for a direction.
        settings=_tokens(objective={"kind": "kl_cov", "share": 2e-3, "coefficient": 1.0}, **_OLD_IS_EVALUATED),
    ),
    "nsr": Preset(
        summary="NSR: only samples with a negative reward teach, so that no answer is made likelier than the others",
        source="2506.01347",
        likelihood="tokens",
        objective="clipped",
        anchor="none",
        advantage="none-std",
        # For rewards of +1 and -1, which are the advantages.
        settings=_tokens(advantage={"baseline": "none", "std": "none", "positive": 0.0}),
    ),
    "w_reinforce": Preset(
        summary="W-REINFORCE: NSR, with a tenth of what positive rewards teach",
        source="2506.01347",
        likelihood="tokens",
        objective="clipped",
        anchor="none",
        advantage="none-std",
        settings=_tokens(advantage={"baseline": "none", "std": "none", "positive": 0.1}),
    ),
}
