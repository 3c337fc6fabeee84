"""Cells of the text arena: recipe, fixed point, and the quantity that the setting optimises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.arenas.text import BETA, Answer, Cell
from difrl.tasks.exact.enumerable_solutions import Array, exponential_tilt, solve_token_wise, solve_with_std

DIVIDED = {"baseline": "mean", "std": "group"}
FROZEN = {"old": {"decay": 1.0}}
"""Snapshots with which ℓ_old stays that of the base."""
TOKEN_WISE = "token-wise: π(a given x) ∝ π_ref exp(Q/β)"
SEQUENCE = "E[r] − β KL(π ‖ π_ref): π\\*"


def anchored(divergence: str, coefficient: float = BETA, **more: Any) -> dict[str, Any]:
    """Return an anchor to the base."""
    return {"anchors": [{"divergence": divergence, "coefficient": coefficient, **more}]}


def distilled(decisions: str, snapshots: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return sections of CRD on raw rewards without an anchor."""
    return {
        "likelihood": {"kind": "tokens", "old": "recompute"},
        "snapshots": snapshots,
        "objective": {"kind": "centred", "reward": "raw", "decisions": decisions},
        "advantage": {"baseline": "mean", "std": "none"},
        **more,
    }


def optimum(beta: float = BETA) -> Answer:
    """Return the tilt of the base."""
    return lambda reference, reward: exponential_tilt(reference, reward, beta)


def tokens(divergence: str, coefficient: float = BETA) -> Answer:
    """Return the optimum after each prefix for the mean reward of its continuations."""
    return lambda reference, reward: solve_token_wise(reference, reward, coefficient, divergence)


def tokens_divided(divergence: str) -> Answer:
    """Return the optimum of `tokens` if advantages, but not the anchor, are divided by the standard deviation of rewards."""

    def answer(reference: Array, reward: Array) -> Array:
        return solve_with_std(lambda beta: solve_token_wise(reference, reward, beta, divergence), reward, BETA)

    return answer


CELLS: Sequence[Cell] = (
    Cell("k1_sequence", "k1", "reward, of the sequence", SEQUENCE, anchored("k1", place="reward"), optimum()),
    Cell(
        "k1_sequence_std",
        "k1",
        "reward, of the sequence; A / group std",
        SEQUENCE + ", reached by steps that do not shrink",
        {**anchored("k1", place="reward"), "advantage": DIVIDED},
        optimum(),
    ),
    Cell(
        "k1_token",
        "k1",
        "advantage, of the token alone",
        TOKEN_WISE,
        anchored("k1", place="decision"),
        tokens("reverse_kl"),
    ),
    Cell(
        "k1_token_std",
        "k1",
        "advantage, of the token alone; A / group std",
        TOKEN_WISE + ", β times the std of r",
        {**anchored("k1", place="decision"), "advantage": DIVIDED},
        tokens_divided("reverse_kl"),
    ),
    Cell("k2_loss", "k2", "loss", TOKEN_WISE, anchored("k2"), tokens("reverse_kl")),
    Cell(
        "reverse_full", "reverse KL, full vocabulary", "loss", TOKEN_WISE, anchored("reverse_kl"), tokens("reverse_kl")
    ),
    Cell(
        "reverse_sampled",
        "reverse KL, token drawn",
        "loss",
        TOKEN_WISE,
        anchored("reverse_kl", vocabulary="sampled"),
        tokens("reverse_kl"),
    ),
    Cell(
        "k3_loss",
        "k3",
        "loss",
        "token by token against KL(π_ref ‖ π): π ∝ π_ref / (λ − Q)",
        anchored("k3"),
        tokens("forward_kl"),
    ),
    Cell(
        "grpo",
        "k3",
        "loss; A / group std (GRPO)",
        "as k3_loss, β times the std of r",
        {**anchored("k3"), "advantage": DIVIDED},
        tokens_divided("forward_kl"),
    ),
    Cell(
        "forward_full",
        "forward KL, full vocabulary",
        "loss",
        "as k3_loss",
        anchored("forward_kl"),
        tokens("forward_kl"),
    ),
    Cell(
        "jensen_shannon",
        "Jensen–Shannon, full vocabulary, 2β",
        "loss",
        "token by token against it",
        anchored("jensen_shannon", 2 * BETA),
        tokens("jensen_shannon", 2 * BETA),
    ),
    Cell(
        "hellinger",
        "squared Hellinger, full vocabulary, 4β",
        "loss",
        "token by token against it",
        anchored("hellinger", 4 * BETA),
        tokens("hellinger", 4 * BETA),
    ),
    Cell("crd_sequence", "CRD, Δ summed, old = base", "–", SEQUENCE, distilled("sum", FROZEN), optimum()),
    Cell(
        "crd_reset",
        "CRD, Δ summed, old reset to θ after half of the run",
        "–",
        "the tilt of the tilt: π_ref exp(2 r/β)",
        distilled("sum", {"old": {"kind": "reset", "every": 100}}, train={"lr": 0.1}),
        optimum(BETA / 2),
        steps=200,
    ),
    Cell(
        "adpo",
        "anchored preference, Δ summed",
        "–",
        SEQUENCE,
        {
            "objective": {"kind": "anchored_preference", "decisions": "sum"},
            "advantage": {"baseline": "mean", "std": "none"},
        },
        optimum(),
    ),
    Cell(
        "crd_moving",
        "CRD, Δ summed, old = θ",
        "–",
        "E[r] alone: one completion of high reward",
        distilled("sum", {}, likelihood={"kind": "tokens", "old": "detach"}),
        None,
    ),
    Cell("free", "none", "–", "E[r] alone: one completion of high reward", {}, None),
)
