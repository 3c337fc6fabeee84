"""A vision-language model as a judge, behind any endpoint with OpenAI's chat completions (vLLM, SGLang, llama.cpp …).

The model gets the image, or some frames of the video, and a question, and rates it on a scale from l to h:

    text:      score = (r − l)/(h − l),   r = the rating in its reply
    expected:  score = (Σᵣ r p(r)/Σᵣ p(r) − l)/(h − l),   p(r) = probability of the token r at the place of its rating

`expected` is G-Eval's weighted rating (arXiv:2303.16634), over the most likely tokens that the endpoint returns, and
normalised over those that are ratings. It distinguishes samples for which the model would write the same number.

For an edit it gets the input image first and the output second, and one of the published `RUBRICS` or a question of yours.

A reply without a clear rating (a refusal, prose, two numbers, a truncated answer) makes an invalid row. Such replies are
counted and logged. A failure of the endpoint is an error.
"""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from rewards.base import Metadata, RewardError, Scores, WithoutDevice, check_images, check_videos
from rewards.edit_rubrics import RUBRICS, Rubric
from rewards.encoding import FORMATS, encode_images
from rewards.frames import spread_frames
from rewards.http import RETRIES, TIMEOUT, Connection, HttpError, map_concurrently, read_secret
from rewards.input_images import read_inputs
from rewards.options import check_at_least_one, check_choice
from rewards.patterns import compile_pattern, find_all
from rewards.protocol import printable
from rewards.workers import call_each

log = logging.getLogger(__name__)
SECONDS = 5
"""Limit for finding the option `pattern` in a reply, in seconds of computing."""
QUESTION = (
    'How well does this {sample} show "{prompt}"? Rate it from {lowest} (not at all) to {highest} (perfectly). '
    "Answer with the number alone."
)
VIDEO = "video, of which you see {frames} frames in order,"
"""The {sample} of a question about a video; of one about an image it is "image"."""
SCORES = ("text", "expected")
TOP_LOGPROBS = 20  # likely tokens in the response: the maximum of OpenAI's endpoint and, by default, of vLLM's


class VlmJudge(WithoutDevice):
    """Rating of the image or video by a vision-language model behind an OpenAI-compatible endpoint, scaled to [0,1].

    base_url: with its version, as in http://127.0.0.1:8000/v1. api_key_env: the environment variable with the key.
    question: a template with {prompt}, {lowest}, {highest} and {sample}, which is "image" or describes the frames of a video.
    video_frames: most frames of a video that are sent, evenly spaced, the first and the last among them. rubric: a published
    question about an edit with its scale: editreward, editreward_following or editreward_quality. input_image: whether the
    model sees the input image before the one that it rates; with a rubric it always does. score: text or expected. pattern:
    a regular expression whose last match has the rating in its first group, for a model that writes its reasoning first.
    request: additional fields of the request.
    """

    name = "vlm_judge"
    needs: tuple[str, ...] = ("images", "videos", "prompts")

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        question: str | None = None,
        video_frames: int = 8,
        rubric: str | None = None,
        input_image: bool = False,
        scale: Sequence[int] | None = None,
        score: str = "text",
        pattern: str | None = None,
        max_tokens: int = 64,
        request: Mapping[str, Any] | None = None,
        max_concurrency: int = 8,
        format: str = "png",
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        published = _find_rubric(rubric, question, scale)
        self.shows_input = input_image or rubric is not None
        # Frames of a video are shown one by one beside an input image.
        self.needs = ("images", "prompts", "metadata") if self.shows_input else ("images", "videos", "prompts")
        self.lowest, self.highest = _check_scale(
            scale or published.scale, check_choice(self.name, "score", score, SCORES)
        )
        check_at_least_one(self.name, max_concurrency=max_concurrency, max_tokens=max_tokens, video_frames=video_frames)
        self.video_frames = video_frames
        self.expected = score == "expected"
        self.question = (
            (question or published.question)
            .replace("{lowest}", str(self.lowest))
            .replace("{highest}", str(self.highest))
        )
        self.takes_last = pattern is not None
        compiled = compile_pattern(pattern or _number_pattern(self.highest), "reward 'vlm_judge': pattern")
        self.pattern = compiled.pattern
        if compiled.groups < 1:
            raise ValueError(f"reward 'vlm_judge': pattern is {pattern!r}, expected a group (…) around the rating")
        self.max_concurrency, self.format = max_concurrency, check_choice(self.name, "format", format, FORMATS)
        self.body = {"model": model, "temperature": 0.0, "max_tokens": max_tokens}
        if self.expected:
            self.body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        self.body |= request or {}
        key = read_secret(api_key_env, self.name, "api_key_env")
        self.connection = Connection(self.name, base_url, token=key, timeout=timeout, retries=retries)
        self.unrated = 0  # replies without a rating, over all calls

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] or videos [B,F,3,H,W] in [0,1], rounded to 8 bits."""
        if samples.ndim == 5:
            pictures = spread_frames(check_videos(samples, self.name), self.video_frames)
            sample = VIDEO.replace("{frames}", str(pictures.shape[1]))
        else:
            pictures, sample = check_images(samples, self.name)[:, None], "image"
        inputs = read_inputs(self.name, prompts, metadata) if self.shows_input else None
        question = self.question.replace("{sample}", sample)
        ratings = map_concurrently(
            lambda row: self.rate(
                [*(() if inputs is None else inputs[row : row + 1]), *pictures[row]], question, prompts[row], row
            ),
            range(len(prompts)),
            self.max_concurrency,
        )
        unrated = ratings.count(None)
        if unrated:
            self.unrated += unrated
            log.warning("vlm_judge: %d of %d replies had no rating; they are invalid rows", unrated, len(ratings))
        width = self.highest - self.lowest
        values = [None if rating is None else (rating - self.lowest) / width for rating in ratings]
        return Scores.from_list(values).to(samples.device)

    def rate(self, images: Sequence[Tensor], question: str, prompt: str, row: int) -> float | None:
        """Return the model's rating on the scale, None if the reply has none.

        images: each [3,H,W]: the image, or the frames of the video; before it the input image, if the model sees it.
        """
        text = question.replace("{prompt}", prompt)
        try:
            response = self.connection.post(
                "/chat/completions", json={**self.body, "messages": self._messages(images, text)}
            )
        except HttpError as error:
            raise RewardError(self.name, error.problem, row, prompt) from error
        try:
            return self._parse_rating(response["choices"][0])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            address = f"{self.connection.url}/chat/completions"
            problem = f"{address} answered something that is not a chat completion: {printable(str(response))}"
            if self.expected:
                problem += "; score: expected needs an endpoint that returns logprobs"
            raise RewardError(self.name, problem, row, prompt) from error

    def _messages(self, images: Sequence[Tensor], text: str) -> list[dict[str, object]]:
        content = list[dict[str, object]]()
        for image in images:
            (file,) = encode_images(image[None], self.format)
            url = f"data:image/{self.format};base64,{base64.b64encode(file).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": text})
        return [{"role": "user", "content": content}]

    def _parse_rating(self, choice: Mapping[str, Any]) -> float | None:
        steps = choice["logprobs"]["content"] if self.expected else []
        content = "".join(step["token"] for step in steps) if self.expected else choice["message"]["content"]
        reply = "" if content is None else content  # None: a refusal, with some endpoints
        found = self.find_rating(reply)
        if found is None:
            return None
        # A truncated 1 may be the beginning of 10, but not at the start of a reply on a scale of digits.
        start, rating_start, rating = found
        is_certain = self.expected and not reply[:start].strip()
        if choice.get("finish_reason") == "length" and not is_certain:
            return None
        if not self.expected:
            return float(rating)
        ends = accumulate(len(step["token"]) for step in steps)
        top = next(step["top_logprobs"] for end, step in zip(ends, steps, strict=True) if end > rating_start)
        return expected_rating([(each["token"], each["logprob"]) for each in top], self.lowest, self.highest)

    def find_rating(self, reply: str) -> tuple[int, int, str] | None:
        """Return the rating in a reply, with where its match and itself start: the last of `pattern`, or the only number."""
        if self.takes_last:
            (matches,) = call_each("rewards.patterns:find_all", [(self.pattern, reply)], SECONDS, self.name)
            matches = (matches or [])[-1:]
        else:
            matches = find_all(self.pattern, reply)
        if len(matches) != 1:
            return None
        try:
            rating = float(matches[0][2])
        except ValueError:
            return None
        return matches[0] if self.lowest <= rating <= self.highest else None


def expected_rating(top: Sequence[tuple[str, float]], lowest: int, highest: int) -> float | None:
    """Return Σ r p(r)/Σ p(r) over the tokens that are whole numbers on the scale; None if no token is.

    top: tokens with their log-probabilities.
    """
    if not top:
        raise KeyError("top_logprobs")
    ratings = {str(rating): rating for rating in range(lowest, highest + 1)}
    found = [(ratings[token.strip()], math.exp(logprob)) for token, logprob in top if token.strip() in ratings]
    mass = sum(probability for _, probability in found)
    return sum(rating * probability for rating, probability in found) / mass if mass > 0 else None


def _find_rubric(rubric: str | None, question: str | None, scale: Sequence[int] | None) -> Rubric:
    if rubric is None:
        return Rubric(QUESTION, (1, 10))
    if question is not None or scale is not None:
        problem = "rubric has a question and a scale of its own; leave out rubric, or question and scale"
        raise ValueError(f"reward 'vlm_judge': {problem}")
    return RUBRICS[check_choice("vlm_judge", "rubric", rubric, RUBRICS)]


def _number_pattern(highest: int) -> str:
    """Return a pattern of a number outside words and other numbers, which "/10" or "out of 10" may follow."""
    return rf"(?<![A-Za-z0-9_.])([+-]?\d+(?:\.\d+)?)(?![A-Za-z0-9_]|\.\d)(?:\s*(?:/|out of)\s*{highest}(?!\.?\d))?"


def _check_scale(scale: Sequence[int], score: str) -> tuple[int, int]:
    whole = len(scale) == 2 and all(isinstance(end, int) for end in scale)
    if not whole or scale[0] >= scale[1]:
        raise ValueError(f"reward 'vlm_judge': scale is {list(scale)}, expected two whole numbers, as in [1, 10]")
    lowest, highest = scale
    if score == "expected" and not 0 <= lowest < highest <= 9:
        problem = "score: expected uses one token, and many models write 10 as two; set a scale of digits, as in [1, 5]"
        raise ValueError(f"reward 'vlm_judge': scale is {list(scale)}; {problem}")
    return lowest, highest
