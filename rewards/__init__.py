"""Rewards: score images and texts. Usable without the trainer: ``from rewards import make, score``."""

from __future__ import annotations

from rewards.base import Reward, RewardError, Scores, score
from rewards.detectors import BACKGROUND, PALETTE, Detection, Detector, ShapesDetector, TransformersDetector
from rewards.geneval import GenEval
from rewards.jpeg import JpegSize
from rewards.judge import Judge, JudgeConfig, JudgeNetwork
from rewards.ocr import Ocr
from rewards.registry import Entry, available, make, register

__all__ = [
    "BACKGROUND",
    "PALETTE",
    "Detection",
    "Detector",
    "Entry",
    "GenEval",
    "JpegSize",
    "Judge",
    "JudgeConfig",
    "JudgeNetwork",
    "Ocr",
    "Reward",
    "RewardError",
    "Scores",
    "ShapesDetector",
    "TransformersDetector",
    "available",
    "make",
    "register",
    "score",
]
