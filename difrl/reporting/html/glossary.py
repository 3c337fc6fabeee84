"""Definitions of every metric of a run folder, with its estimator.

Keys are shell patterns over metric names, the most specific first. The report shows a definition as a tooltip beside the
metric, and lists the definitions in use at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from difrl.reporting.summary import STDERR

DEFINITIONS: dict[str, str] = {
    "step": "One rollout with its updates; step 0 is the model before training.",
    "nfe": (
        "Denoiser evaluations that training has cost so far, for rollouts and updates, counted per sample (guidance "
        "counts two); for language models, tokens generated so far."
    ),
    "reward/mean": (
        "The optimised quantity: the sum of the trained rewards, after any shapes of the recipe, with the weights of "
        "the step, averaged over the valid samples of the step's rollout."
    ),
    "reward/*": (
        "One trained reward before any shape, averaged over the samples of the step's rollout that it could score. "
        "For an ensemble: the combined score, and the score of each member."
    ),
    "shaped/*": (
        "A trained reward after its shape: the value that its weight multiplies, or that its ensemble combines."
    ),
    "weight/*": (
        "Weight of a trained reward in the step, from a schedule or a Lagrange multiplier (arXiv:2310.04373)."
    ),
    "watch/*": "A watched reward, averaged over the step's rollout. It is scored and never optimised.",
    "diversity/*": (
        "Mean distance between two samples of one prompt, over all pairs, then over the step's prompts (pixels: root "
        "mean square over thumbnails of 16 × 16; ngrams: √(1 − cos) of the texts' 3-grams)."
    ),
    "nfe/check": (
        "Evaluations of this step's first-update check, averaged over the processes. They do not count as nfe. If the "
        "log-probabilities of the samples were recorded, the check takes none."
    ),
    "kl/*": (
        "Divergence of the trained weights from this anchor, of the kind that its setting names (velocity: mean "
        "squared difference of outputs; gaussian: closed form; k2, k3: from log-ratios), averaged over the step's "
        "decisions. For an anchor in the reward or on decisions: the log-ratio of the sampling weights to the anchor "
        "(centred: its expectation), summed over a sample and averaged over samples. For rehearsed samples: averaged "
        "over their decisions."
    ),
    "coefficient/*": "Factor of the divergence from this anchor, averaged over the step's decisions.",
    "divergence/*": (
        "Mean squared difference between the outputs of the sampled model and of this model, at the states of the "
        "sampled model's own run, averaged over its steps and over samples of the evaluation prompts. For language "
        "models: KL(sampled ‖ this model) of whole completions, in nats: the exact KL of each next token, summed over "
        "a completion's tokens and averaged over completions."
    ),
    "cost/evaluations": "Denoiser evaluations of one sample (guidance counts two, and so does RLG).",
    "cost/saved": "Denoiser evaluations of one sample that adaptive guidance left out (arXiv:2312.12487).",
    "rollout/mismatch": (
        "|ℓ_here − ℓ_engine| of a token or denoising step: the difference between the log-probabilities of the trained "
        "network and of the engine, or the quantised network, that drew the samples, under the same weights; averaged "
        "over a sample's decisions, then over samples."
    ),
    "rollout/correction": (
        "Truncated importance weight of a token or denoising step, min(exp(ℓ_here − ℓ_engine), correction), averaged "
        "over a sample's decisions, then over samples. It is near 1 unless many weights are truncated."
    ),
    "ratio/mean": "Mean over the step's decisions of ρ = exp(ℓ_θ − ℓ_old).",
    "ratio/std": "Standard deviation over the step's decisions of ρ = exp(ℓ_θ − ℓ_old).",
    "ratio/normalised": (
        "Mean over the step's decisions of the normalised ratio exp(scale · (log ρ + bias)); 1 to first order "
        "(arXiv:2510.22319)."
    ),
    "ratio/*": "A statistic over the step's decisions of ρ = exp(ℓ_θ − ℓ_old).",
    "clip/high": "Share of decisions with a positive advantage whose ratio was above the upper clipping bound.",
    "clip/dual": "Share of decisions with a negative advantage whose ratio was above the bound of dual clipping.",
    "clip/low": "Share of decisions with a negative advantage whose ratio was below the lower clipping bound.",
    "approx_kl": "Mean over the step's decisions of the k3 estimate of KL(old‖θ), ρ − 1 − log ρ.",
    "covariance/mean": (
        "Covariance of log-probability and advantage over the step's decisions: approximately the decrease of the "
        "entropy by a step of the policy gradient (arXiv:2505.22617)."
    ),
    "covariance/held": (
        "Share of decisions selected by their covariance: removed from the gradient (clip_cov), or penalised (kl_cov)."
    ),
    "trust/kl": "Exact KL(old‖θ) of a decision, averaged over the step's decisions.",
    "trust/dropped": (
        "Share of decisions whose loss was dropped, because they were far from old and the update led further away."
    ),
    "centred/error": (
        "Squared difference between centred log-ratios times β and centred rewards, averaged over the step's "
        "decisions (arXiv:2603.14128)."
    ),
    "negative/*": (
        "−ℓ of the mixture towards (plus) or away from (minus) the trained weights, averaged over the step's "
        "decisions (arXiv:2509.16117)."
    ),
    "preference/margin": (
        "Gain of the best sample of a group over the reference minus that of the worst sample, averaged over groups."
    ),
    "preference/accuracy": (
        "Share of groups whose best sample gained more over the reference than the worst. For softmaxes over a group: "
        "the probability of the samples whose target is above average."
    ),
    "preference/kl": "KL(target‖θ) of the two softmaxes over a group, averaged over groups (arXiv:2510.18913).",
    "invalid/*": (
        "Share of the step's samples that this reward did not score, because it could not or because its failure was "
        "dropped."
    ),
    "references/invalid/*": (
        "Share of the step's samples whose prompt has no reference sample that this reward could score, so that they "
        "have no comparison."
    ),
    "samples/invalid": (
        "Share of the step's samples for which a trained reward, or its shape, gave no number. They give no learning "
        "signal."
    ),
    "groups/zero_std": (
        "Share of the step's prompts whose samples all had the same reward, and so gave no learning signal."
    ),
    "updates/skipped": "Updates of the step that were skipped because none of their samples could be scored.",
    "guard/fallen": (
        "Number of watched measures that at this evaluation were clearly below their best, while the trained reward "
        "was clearly above its value at the time of that best."
    ),
    "guard/strikes": "Number of consecutive evaluations, up to this one, at which a guarded measure had fallen.",
    "guard/best_step": (
        "Step of the evaluation with the highest trained reward at which no guarded measure had fallen."
    ),
    "grad_norm": "Euclidean norm of the gradient before clipping, averaged over the step's updates.",
    "loss": (
        "The objective plus every anchor's term, averaged over the step's decisions. Its absolute value has little "
        "meaning."
    ),
    "loss/objective": "The objective without the anchors' terms, averaged over the step's decisions.",
    "lr": "Learning rate of the step's last update.",
    "time/rollout": "Seconds of the step spent drawing samples, decoding included.",
    "time/score": "Seconds of the step spent in the rewards, trained and watched.",
    "time/update": "Seconds of the step spent in likelihoods, gradients and optimizer.",
    "time/references": (
        "Seconds of the step spent drawing and scoring the reference samples of prompts that were new or lacked some."
    ),
    "time/*": "Seconds of the step spent in this stage.",
    "eval/reward/mean": (
        "Sum of the trained rewards before any shape, with constant weights (those at the end of a schedule or the "
        "start of a multiplier), averaged over samples of the evaluation prompts, which are never trained on."
    ),
    "eval/reward/*": "One trained reward, averaged over samples of the evaluation prompts.",
    "eval/invalid/*": "Share of the evaluated samples that this reward did not score. Means are over the others.",
    "eval/watch/*": "A watched reward, averaged over samples of the evaluation prompts.",
    "eval/diversity/*": "The same distance as in diversity, over samples of the evaluation prompts.",
    "*/stderr": "Standard error of the mean: the standard deviation of the averaged values, divided by √n.",
    "rlg weight": (
        "w in out = out_base + w·(out_trained − out_base), of denoisers' outputs or of logits: 0 is the base model, 1 "
        "the trained model, and a larger w extrapolates (arXiv:2508.21016)."
    ),
}


def definition(key: str) -> str:
    """Return the definition of a metric, or an empty string if it has none."""
    return DEFINITIONS.get(_pattern(key), "")


def entries(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Return (pattern, definition) of the metrics in `keys`, each once, in the order of DEFINITIONS."""
    used = {_pattern(key) for key in keys}
    return [(pattern, text) for pattern, text in DEFINITIONS.items() if pattern in used]


def _pattern(key: str) -> str:
    if key.endswith(STDERR):
        return f"*{STDERR}"
    return next((pattern for pattern in DEFINITIONS if fnmatchcase(key, pattern)), "")
