"""A vision-language model as a judge, behind any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp …).

The model sees the image and a question, and rates it on a scale from l to h:

    text:      score = (r − l)/(h − l),   r = the rating that it writes
    expected:  score = (Σᵣ r p(r)/Σᵣ p(r) − l)/(h − l),   p(r) = probability of the token r where it writes its rating

The second is G-Eval's weighted rating (arXiv:2303.16634), over the most likely tokens, as many as the endpoint
tells, and normalised over those that are ratings. It tells samples apart to which the model would write the same number.

A reply that holds no rating (a refusal, prose, two numbers of which nobody knows which is meant, an answer cut off) makes
an invalid row, which is counted and logged. An endpoint that fails is an error.
"""

from __future__ import annotations

import base64
import logging
import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rewards.base import Metadata, RewardError, Scores, check_images
from rewards.encoding import checked_format, encoded
from rewards.http import RETRIES, TIMEOUT, Connection, HttpError, concurrently, secret
from rewards.math_answers import compiled

log = logging.getLogger(__name__)
QUESTION = (
    'How well does this image show "{prompt}"? Rate it from {lowest} (not at all) to {highest} (perfectly). '
    "Answer with the number alone."
)
TOLD = 20  # most likely tokens asked for: the most that OpenAI's endpoint and, by default, vLLM's give


class VlmJudge:
    """Rating of the image by a vision-language model behind an OpenAI-compatible endpoint, brought to [0,1].

    base_url: with its version, as in http://127.0.0.1:8000/v1. api_key_env: the environment variable that holds the key.
    question: {prompt}, {lowest} and {highest} stand for themselves. score: text or expected. pattern: a regular expression
    whose last match holds the rating in its first group, for a model that thinks aloud. request: further fields of the
    request, as the endpoint knows them.
    """

    name = "vlm_judge"
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        question: str = QUESTION,
        scale: Sequence[int] = (1, 10),
        score: str = "text",
        pattern: str | None = None,
        max_tokens: int = 64,
        request: Mapping[str, Any] | None = None,
        max_concurrency: int = 8,
        format: str = "png",
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        self.lowest, self.highest = _checked_scale(scale, score)
        if max_concurrency < 1 or max_tokens < 1:
            raise ValueError(
                f"reward 'vlm_judge': max_concurrency is {max_concurrency} and max_tokens {max_tokens}, expected 1 or more"
            )
        self.expected = score == "expected"
        self.question = question.replace("{lowest}", str(self.lowest)).replace("{highest}", str(self.highest))
        self.chosen = pattern is not None
        self.pattern = compiled(
            _only_number(self.highest) if pattern is None else pattern, "reward 'vlm_judge': pattern"
        )
        if self.pattern.groups < 1:
            raise ValueError(f"reward 'vlm_judge': pattern is {pattern!r}, expected a group (…) around the rating")
        self.max_concurrency, self.format = max_concurrency, checked_format(format, self.name)
        self.body = {"model": model, "temperature": 0.0, "max_tokens": max_tokens}
        if self.expected:
            self.body |= {"logprobs": True, "top_logprobs": TOLD}
        self.body |= request or {}
        key = secret(api_key_env, self.name, "api_key_env")
        self.connection = Connection(self.name, base_url, token=key, timeout=timeout, retries=retries)
        self.unread = 0  # replies without a rating, of all calls

    def to(self, device: torch.device | str) -> VlmJudge:
        """Nothing to move: the model is elsewhere."""
        return self

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1], rounded to 8 bits."""
        images = check_images(samples, self.name)

        def asked(row: int) -> float | None:
            return self.ask(images[row : row + 1], prompts[row], row)

        ratings = concurrently(asked, range(len(prompts)), self.max_concurrency)
        unread = ratings.count(None)
        if unread:
            self.unread += unread
            log.warning("vlm_judge: %d of %d replies held no rating; they are invalid rows", unread, len(ratings))
        width = self.highest - self.lowest
        values = [0.0 if rating is None else (rating - self.lowest) / width for rating in ratings]
        valid = [rating is not None for rating in ratings]
        return Scores(
            torch.tensor(values, dtype=torch.float32, device=samples.device),
            torch.tensor(valid, dtype=torch.bool, device=samples.device),
        )

    def ask(self, image: Tensor, prompt: str, row: int) -> float | None:
        """The rating of an image [1,3,H,W], on the scale; None where the reply holds none."""
        try:
            said = self.connection.post(
                "/chat/completions", json={**self.body, "messages": self._messages(image, prompt)}
            )
        except HttpError as error:
            raise RewardError(self.name, error.problem, row, prompt) from error
        try:
            choice = said["choices"][0]
            return self._rated(choice)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            found = f"{self.connection.url}/chat/completions answered what is no chat completion: {str(said)[:300]}"
            if self.expected:
                found += "; score: expected needs an endpoint that gives logprobs"
            raise RewardError(self.name, found, row, prompt) from error

    def _messages(self, image: Tensor, prompt: str) -> list[dict[str, Any]]:
        (file,) = encoded(image, self.format)
        url = f"data:image/{self.format};base64,{base64.b64encode(file).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.question.replace("{prompt}", prompt)},
        ]
        return [{"role": "user", "content": content}]

    def _rated(self, choice: Mapping[str, Any]) -> float | None:
        steps = choice["logprobs"]["content"] if self.expected else []
        content = "".join(step["token"] for step in steps) if self.expected else choice["message"]["content"]
        reply = "" if content is None else content  # a refusal, in some endpoints
        found = self.find(reply)
        if found is None or (choice.get("finish_reason") == "length" and not self._complete(reply, found)):
            return None
        if not self.expected:
            return float(found.group(1))
        ends = accumulate(len(step["token"]) for step in steps)
        told = next(step["top_logprobs"] for end, step in zip(ends, steps, strict=True) if end > found.start(1))
        return expected_rating([(one["token"], one["logprob"]) for one in told], self.lowest, self.highest)

    def _complete(self, reply: str, found: re.Match[str]) -> bool:
        """Whether a reply that was cut off says enough: a 1 may be the beginning of 10, but not on a scale of digits."""
        return self.expected and not reply[: found.start()].strip()

    def find(self, reply: str) -> re.Match[str] | None:
        """Where a reply holds its rating: what `pattern` finds last, else its only number, which may be followed by "/10"."""
        matches = list(self.pattern.finditer(reply))
        matches = matches[-1:] if self.chosen else matches
        if len(matches) != 1:
            return None
        try:
            rating = float(matches[0].group(1) or "")
        except ValueError:
            return None
        return matches[0] if self.lowest <= rating <= self.highest else None


def expected_rating(told: Sequence[tuple[str, float]], lowest: int, highest: int) -> float | None:
    """Σ r p(r)/Σ p(r) over tokens with their log-probabilities, of which only whole numbers on the scale count.

    None where none of them does.
    """
    if not told:
        raise KeyError("top_logprobs")
    ratings = {str(rating): rating for rating in range(lowest, highest + 1)}
    found = [(ratings[token.strip()], math.exp(logprob)) for token, logprob in told if token.strip() in ratings]
    mass = sum(probability for _, probability in found)
    return sum(rating * probability for rating, probability in found) / mass if mass > 0 else None


def _only_number(highest: int) -> str:
    """A number, which "/10" or "out of 10" may follow; not a part of a word or of another number."""
    return rf"(?<![A-Za-z0-9_.])([+-]?\d+(?:\.\d+)?)(?![A-Za-z0-9_]|\.\d)(?:\s*(?:/|out of)\s*{highest}(?!\.?\d))?"


def _checked_scale(scale: Sequence[int], score: str) -> tuple[int, int]:
    if score not in ("text", "expected"):
        raise ValueError(f"reward 'vlm_judge': score is {score!r}, expected text or expected")
    whole = len(scale) == 2 and all(isinstance(end, int) for end in scale)
    if not whole or scale[0] >= scale[1]:
        raise ValueError(f"reward 'vlm_judge': scale is {list(scale)}, expected two whole numbers, as in [1, 10]")
    lowest, highest = scale
    if score == "expected" and not 0 <= lowest < highest <= 9:
        problem = (
            "score: expected looks at one token, and many models write 10 as two; set a scale of digits, as in [1, 5]"
        )
        raise ValueError(f"reward 'vlm_judge': scale is {list(scale)}; {problem}")
    return lowest, highest
