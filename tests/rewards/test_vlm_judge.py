"""Tests against an endpoint with OpenAI's protocol on a loopback port, and against scripted responses."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from rewards import RewardError, VlmJudge, make, score, vlm_judge
from rewards.http import Connection
from rewards.vlm_judge import expected_rating
from tests.loopback import serving

KEY = "key-of-a-test"


class Endpoint:
    """A model that rates an image by its mean, in tenths. It records its requests."""

    def __init__(self) -> None:
        self.bodies = list[dict[str, Any]]()
        self.keys = set[str | None]()
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.complete)

    async def complete(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization"))
        if body["model"] != "tiny-vlm":
            return JSONResponse({"error": {"message": f"no model {body['model']}", "type": "NotFoundError"}}, 404)
        (message,) = body["messages"]
        *_, picture, _ = message["content"]
        mean = sum(opened(picture["image_url"]["url"]).convert("L").resize((1, 1)).tobytes()) / 255
        rating = str(round(10 * mean))
        choice = {"index": 0, "message": {"role": "assistant", "content": rating}, "finish_reason": "stop"}
        return JSONResponse({"object": "chat.completion", "choices": [choice]})


def opened(url: str) -> Image.Image:
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", url).groups()  # type: ignore[union-attr]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == kind.upper()
    return image


endpoint = Endpoint()


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with serving(endpoint.app) as url:
        yield f"{url}/v1"


@pytest.fixture
def judge(base_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VlmJudge]]:
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    made = list[VlmJudge]()

    def connect(**options: Any) -> VlmJudge:
        given_options = {"base_url": base_url, "model": "tiny-vlm", "api_key_env": "KEY_OF_TEST", "retries": 0}
        found = make("vlm_judge", **{**given_options, "scale": [0, 10], **options})
        assert isinstance(found, VlmJudge)
        made.append(found)
        return found

    endpoint.bodies.clear()
    endpoint.keys.clear()
    yield connect
    for one in made:
        one.connection.close()


def greys(*levels: float) -> Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8)


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_images_and_prompts_reach_the_model_and_ratings_their_rows(judge: Callable[..., VlmJudge], format: str) -> None:
    levels = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0]
    prompts = [f'sign {{lowest}} "{i}"' for i in range(len(levels))]
    found = score(judge(format=format, max_concurrency=3), greys(*levels), prompts, [{}] * len(levels))
    assert found.values.tolist() == pytest.approx(levels)
    assert found.valid.all()
    asked = sorted(body["messages"][0]["content"][1]["text"] for body in endpoint.bodies)
    assert asked[0] == (
        'How well does this image show "sign {lowest} "0""? Rate it from 0 (not at all) to 10 (perfectly). '
        "Answer with the number alone."
    )
    assert len(set(asked)) == len(levels)
    assert {body["temperature"] for body in endpoint.bodies} == {0.0}
    assert endpoint.keys == {f"Bearer {KEY}"}


def test_the_request_has_image_question_and_options(judge: Callable[..., VlmJudge]) -> None:
    fields = {"seed": 3, "temperature": 0.5, "chat_template_kwargs": {"enable_thinking": False}}
    score(judge(question="Is it {good}? {lowest}–{highest}", request=fields), greys(0.5), ["a"], [{}])
    (body,) = endpoint.bodies
    assert body["messages"][0]["content"][1]["text"] == "Is it {good}? 0–10"
    del body["messages"]
    assert body == {"model": "tiny-vlm", "max_tokens": 64, **fields}


def test_the_model_sees_the_input_before_the_output_of_an_edit(judge: Callable[..., VlmJudge], tmp_path: Path) -> None:
    """The published question with the instruction, and ratings of the output on its scale of 1 to 8."""
    Image.new("RGB", (5, 4), (0, 0, 255)).save(tmp_path / "cat.webp", lossless=True)
    metadata = [{"image": str(tmp_path / "cat.webp")}] * 2
    reward = judge(rubric="editreward", scale=None)
    assert reward.needs == ("images", "prompts", "metadata")
    found = score(reward, greys(0.1, 0.8), ["make it {red}", "turn it"], metadata)
    assert found.values.tolist() == pytest.approx([0, 1])
    contents = [body["messages"][0]["content"] for body in endpoint.bodies]
    assert [[part["type"] for part in content] for content in contents] == [["image_url", "image_url", "text"]] * 2
    first, second, _ = contents[0]
    assert opened(first["image_url"]["url"]).size == (5, 4)
    assert opened(first["image_url"]["url"]).getpixel((0, 0)) == (0, 0, 255)
    assert opened(second["image_url"]["url"]).size == (8, 8)
    asked = sorted(content[2]["text"] for content in contents)
    assert "assigning a score from 1 to 8, with 1 being the worst" in asked[0]
    assert "\nText instruction - make it {red}\n" in asked[0]
    assert "\nText instruction - turn it\n" in asked[1]


def test_a_question_of_ones_own_about_an_edit(judge: Callable[..., VlmJudge], tmp_path: Path) -> None:
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    reward = judge(question="Was {prompt} done?", input_image=True)
    score(reward, greys(0.5), ["a"], [{"image": str(tmp_path / "a.png")}])
    (content,) = [body["messages"][0]["content"] for body in endpoint.bodies]
    assert content[2]["text"] == "Was a done?"
    with pytest.raises(RewardError, match="the metadata have no input image"):
        score(reward, greys(0.5), ["a"], [{}])
    assert judge().needs == ("images", "videos", "prompts")


@pytest.mark.parametrize("other", [{"question": "Is it {prompt}?"}, {"scale": [1, 5]}])
def test_a_rubric_has_its_own_question_and_scale(judge: Callable[..., VlmJudge], other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rubric has a question and a scale of its own"):
        judge(**{"scale": None, "rubric": "editreward_quality", **other})
    with pytest.raises(ValueError, match="rubric is 'editscore', expected one of editreward, editreward_following"):
        judge(rubric="editscore", scale=None)


def test_a_refusal_of_the_endpoint_is_an_error(judge: Callable[..., VlmJudge], base_url: str) -> None:
    message = (
        rf"'vlm_judge' failed at row 0 \(prompt 'a'\): {base_url}/chat/completions answered 404 .*: no model other"
    )
    with pytest.raises(RewardError, match=message):
        score(judge(model="other"), greys(0.5), ["a"], [{}])


def test_no_samples(judge: Callable[..., VlmJudge]) -> None:
    assert score(judge(), greys()[:0], [], []).values.shape == (0,)


def scripted(answer: Callable[[int], Any], **options: Any) -> tuple[VlmJudge, list[float]]:
    """Return a judge whose endpoint responds to its k-th request with `answer(k)`."""
    count, lock, pauses = 0, threading.Lock(), list[float]()

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal count
        with lock:
            count += 1
            found = answer(count - 1)
        return found if isinstance(found, httpx.Response) else httpx.Response(200, content=json.dumps(found).encode())

    transport = httpx.MockTransport(handle)
    judge = VlmJudge(base_url="http://far/v1", model="m", max_concurrency=1, **options)
    judge.connection = Connection("vlm_judge", "http://far/v1", retries=2, transport=transport, sleep=pauses.append)
    return judge, pauses


def said(content: Any, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, "finish_reason": finish}]}


def rate(judge: VlmJudge, rows: int = 1) -> list[float | None]:
    found = score(judge, greys(*[0.5] * rows), ["a"] * rows, [{}] * rows)
    return [value if valid else None for value, valid in zip(found.values.tolist(), found.valid.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("1", 1),
        ("10", 10),
        (" 8.\n", 8),
        ("7.5", 7.5),
        ("8/10", 8),
        ("**Rating: 8 / 10.**", 8),
        ("I give it 8 out of 10!", 8),
        ("评分8分", 8),
        ("10/10", 10),
        ("", None),
        (None, None),
        ("I cannot rate this image.", None),
        ("eight", None),
        ("0", None),
        ("11", None),
        ("-8", None),
        ("10.5", None),
        ("80%", None),
        ("8/100", None),
        ("8/5", None),
        ("6-8", None),
        ("between 7 and 8", None),
        ("2 apples: 9", None),
        ("v2 is fine", None),
        ("8x", None),
        ("8.5x", None),
        ("1e1", None),
    ],
)
def test_the_only_number_on_the_scale_is_the_rating(reply: str | None, rating: float | None) -> None:
    judge, _ = scripted(lambda _: said(reply))
    assert rate(judge) == [None if rating is None else pytest.approx((rating - 1) / 9)]


def test_a_reply_that_was_cut_off_is_no_rating() -> None:
    """A truncated 1 may be the beginning of 10."""
    judge, _ = scripted(lambda _: said("1", "length"))
    assert rate(judge) == [None]


def test_a_pattern_chooses_the_rating_in_prose() -> None:
    judge, _ = scripted(lambda _: said("Rating: 2? No: 3 circles of 4.\nRating: 9 of 10"), pattern=r"Rating: (\d+)")
    assert rate(judge) == [pytest.approx(8 / 9)]
    judge, _ = scripted(lambda _: said("9"), pattern=r"Rating: (\d+)")
    assert rate(judge) == [None]
    judge, _ = scripted(lambda _: said("Rating: high"), pattern=r"Rating: (\w+)")
    assert rate(judge) == [None]


def test_a_pattern_that_never_ends_finds_no_rating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm_judge, "SECONDS", 0.3)
    judge, _ = scripted(lambda k: said("1" * 40 if k == 0 else "5x"), pattern=r"((?:\d|\d)+)x")
    assert rate(judge, 2) == [None, pytest.approx(4 / 9)]


def test_replies_without_a_rating_are_invalid_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    judge, _ = scripted(lambda k: said("no" if k % 3 == 0 else "4"))
    with caplog.at_level(logging.WARNING):
        found = rate(judge, 4)
    assert found == [None, pytest.approx(1 / 3), pytest.approx(1 / 3), None]
    assert "2 of 4 replies had no rating" in caplog.text
    rate(judge, 3)
    assert judge.unrated == 3  # of the two calls


@pytest.mark.parametrize(
    "answer",
    [{}, [], "8", {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {}}]}, said(8), said(["8"]), said({})],
)
def test_a_malformed_chat_completion_is_an_error(answer: Any) -> None:
    judge, _ = scripted(lambda _: answer)
    with pytest.raises(
        RewardError, match=r"at row 0 .*http://far/v1/chat/completions answered something that is not a chat"
    ):
        rate(judge)


def test_a_request_to_a_busy_endpoint_is_repeated() -> None:
    judge, pauses = scripted(
        lambda k: httpx.Response(429, json={"error": {"message": "slower"}}) if k < 2 else said("4")
    )
    assert rate(judge) == [pytest.approx(1 / 3)]
    assert len(pauses) == 2
    judge, pauses = scripted(lambda _: httpx.Response(429, json={"error": {"message": "slower"}}))
    with pytest.raises(RewardError, match=r"answered 429 \(3 attempts\): slower"):
        rate(judge)


def step(token: str, **top: float) -> dict[str, Any]:
    """Return a token with the probabilities of the most likely ones, without the leading underscore of their keywords."""
    told = [{"token": name.removeprefix("_"), "logprob": math.log(p)} for name, p in top.items()]
    return {"token": token, "logprob": told[0]["logprob"] if told else 0.0, "top_logprobs": told}


def with_logprobs(*steps: dict[str, Any], finish: str = "stop") -> dict[str, Any]:
    content = "".join(one["token"] for one in steps)
    return {"choices": [{"message": {"content": content}, "logprobs": {"content": steps}, "finish_reason": finish}]}


RATED = step("4", _4=0.6, _5=0.2, A=0.1, _3=0.1)
EXPECTED = (4 * 0.6 + 5 * 0.2 + 3 * 0.1) / 0.9


@pytest.mark.parametrize(
    ("steps", "finish", "rating"),
    [
        ([RATED], "stop", EXPECTED),
        ([RATED], "length", EXPECTED),  # max_tokens: 1 is enough on a scale of digits
        ([step("Rating", Rating=0.9), step(": ", **{": ": 1.0}), RATED, step(".", **{".": 1.0})], "stop", EXPECTED),
        ([step("Rating: ", **{"Rating: ": 1.0}), RATED], "length", None),
        ([step(" 4", **{" 4": 0.5, "4": 0.25, "2": 0.25})], "stop", 3.5),
        ([step("no", no=0.9, _4=0.1)], "stop", None),
        ([step("9", _9=0.9, _4=0.1)], "stop", None),
        ([RATED, step(" or ", **{" or ": 1.0}), RATED], "stop", None),
        ([step("4/", **{"4/": 1.0}), step("5", _5=1.0)], "stop", None),
    ],
)
def test_the_expected_rating_is_that_at_the_token_of_the_rating(
    steps: Sequence[dict[str, Any]], finish: str, rating: float | None
) -> None:
    judge, _ = scripted(lambda _: with_logprobs(*steps, finish=finish), score="expected", scale=[1, 5])
    assert rate(judge) == [None if rating is None else pytest.approx((rating - 1) / 4)]
    assert (judge.body["logprobs"], judge.body["top_logprobs"]) == (True, 20)


@pytest.mark.parametrize(
    "answer",
    [said("4"), {"choices": [{"message": {"content": "4"}, "logprobs": None}]}, with_logprobs(step("4"))],
)
def test_an_endpoint_without_probabilities_is_an_error(answer: Any) -> None:
    judge, _ = scripted(lambda _: answer, score="expected", scale=[1, 5])
    with pytest.raises(RewardError, match="score: expected needs an endpoint that returns logprobs"):
        rate(judge)


@given(st.lists(st.floats(-20, 0), min_size=5, max_size=5))
def test_the_expected_rating_is_the_mean_of_a_softmax(logits: list[float]) -> None:
    """Tokens that are not ratings, and the total probability of the response, have no effect."""
    p = torch.tensor(logits, dtype=torch.float64).softmax(0)
    told = [(str(rating), logit) for rating, logit in zip(range(1, 6), logits, strict=True)]
    found = expected_rating([("x", 0.0), *told, ("6", 0.0), ("0", 0.0)], 1, 5)
    assert found == pytest.approx(float((p * torch.arange(1, 6)).sum()), abs=1e-12)
    assert found is not None
    assert 1 <= found <= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": [5, 1]}, r"scale is \[5, 1\], expected two whole numbers"),
        ({"scale": [1]}, "expected two whole numbers"),
        ({"scale": [0.5, 1]}, "expected two whole numbers"),
        ({"score": "mean"}, "score is 'mean', expected one of text, expected"),
        ({"score": "expected"}, r"scale is \[1, 10\]; .* set a scale of digits"),
        ({"score": "expected", "scale": [-1, 5]}, r"scale is \[-1, 5\]; .* set a scale of digits"),
        ({"pattern": "("}, "pattern is not a regular expression"),
        ({"pattern": r"\d+"}, r"expected a group \(…\) around the rating"),
        ({"max_concurrency": 0}, "max_concurrency is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"format": "gif"}, "format is 'gif'"),
        ({"base_url": "far/v1"}, "expected a URL"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "api_key_env names .* NO_SUCH_VARIABLE, which is not set"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("vlm_judge", **{"base_url": "http://far/v1", "model": "m", **options})


def test_a_video_is_shown_as_evenly_spaced_frames(judge: Callable[..., VlmJudge]) -> None:
    """Frames 0, 5 and 10 of eleven, whose greys are their numbers; the last one is rated."""
    video = (torch.arange(11) / 10).view(1, 11, 1, 1, 1).expand(1, 11, 3, 8, 8)
    found = score(judge(video_frames=3), video, ["a ball that falls"], [{}])
    assert found.values.tolist() == pytest.approx([1.0])
    (content,) = [body["messages"][0]["content"] for body in endpoint.bodies]
    greys_shown = [opened(part["image_url"]["url"]).convert("L").getpixel((0, 0)) for part in content[:-1]]
    assert greys_shown == [0, 128, 255]
    assert content[-1]["text"].startswith(
        'How well does this video, of which you see 3 frames in order, show "a ball that falls"? Rate it from 0'
    )
