"""Tests of the service in this process, by ASGI. tests/rewards/test_remote.py has the tests over a socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, cast

import httpx
import pytest
import torch
from fastapi import FastAPI, Request
from torch import Tensor

from rewards import RewardError, Scores, server
from rewards.encoding import encode_images
from rewards.protocol import PROTOCOL
from rewards.server import PIXEL_COST, Limits, create_app

LIMITS = Limits(rows=4, megabytes=1, megapixels=1, waiting=8)


class Mean:
    """A reward that returns the mean of an image. Prompts select its failures."""

    name = "mean"
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def to(self, device: torch.device | str) -> Mean:
        return self

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
        self.calls.append(len(prompts))
        self.entered.set()
        assert self.opened.wait(10)
        if "bad" in prompts:
            raise RewardError(self.name, "cannot score this", prompts.index("bad"), "bad")
        if "nan" in prompts:
            return Scores(torch.full((len(prompts),), torch.nan), torch.ones(len(prompts), dtype=torch.bool))
        valid = torch.tensor([not row.get("skip") for row in metadata])
        return Scores(samples.mean((1, 2, 3)), valid)


class Letters:
    """A reward that returns the number of letters of a text."""

    name = "letters"
    needs: tuple[str, ...] = ("texts",)

    def to(self, device: torch.device | str) -> Letters:
        return self

    def __call__(self, samples: Sequence[str], prompts: Sequence[str], metadata: Any) -> list[float | None]:
        return [len(text) if text else None for text in samples]


def app(mean: Mean | None = None, **named: Any) -> FastAPI:
    return create_app(
        {"mean": mean or Mean(), "letters": Letters()}, version="1.2", **{"wait": 0.0, "limits": LIMITS, **named}
    )


def request(to: FastAPI, method: str, path: str, **content: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(to), base_url="http://here") as client:
            return await client.request(method, path, **content)

    return asyncio.run(send())


def form(ask: Any, images: Sequence[bytes] = ()) -> list[tuple[str, tuple[str | None, bytes, str]]]:
    field = ("request", (None, json.dumps(ask).encode(), "application/json"))
    return [field, *(("images", (f"{i}.png", image, "image/png")) for i, image in enumerate(images))]


def grey(*levels: int, size: int = 8) -> list[bytes]:
    return encode_images(torch.tensor(levels)[:, None, None, None].expand(-1, 3, size, size) / 255, "png")


def post(to: FastAPI, ask: Any, images: Sequence[bytes] = (), name: str = "mean", **named: Any) -> httpx.Response:
    return request(to, "POST", f"/score/{name}", files=form(ask, images), **named)


def test_values_come_back_in_order_and_null_where_invalid() -> None:
    ask = {"prompts": ["a", "b", "c"], "metadata": [{}, {"skip": True}, {}]}
    answer = post(app(), ask, grey(0, 51, 255))
    assert answer.status_code == 200
    assert answer.json() == {"values": [0.0, None, 1.0]}


def test_texts() -> None:
    answer = post(app(), {"prompts": ["", "", ""], "texts": ["", "ab", "c"]}, name="letters")
    assert answer.json() == {"values": [None, 2.0, 1.0]}


def test_no_rows_have_no_values() -> None:
    mean = Mean()
    assert post(app(mean), {"prompts": []}).json() == {"values": []}
    assert mean.calls == []


def test_health_reports_loaded_rewards() -> None:
    service = app(token="t")
    state = {"loaded": False, "answered": 0, "waiting": 0}
    fresh = request(service, "GET", "/health")
    assert (fresh.status_code, fresh.json()) == (200, {"ready": True, "rewards": {"mean": state, "letters": state}})
    post(service, {"prompts": ["a", "b"]}, grey(1, 2), headers={"Authorization": "Bearer t"})
    assert request(service, "GET", "/health").json()["rewards"]["mean"] == {"loaded": True, "answered": 2, "waiting": 0}


def test_health_is_503_once_nothing_is_taken() -> None:
    service = app()

    async def shut_down() -> None:
        async with service.router.lifespan_context(service):
            pass

    asyncio.run(shut_down())
    assert request(service, "GET", "/health").status_code == 503
    late = post(service, {"prompts": ["a"]}, grey(1))
    assert (late.status_code, late.json()) == (503, {"error": "reward 'mean' is being shut down"})


def test_version_has_the_facts_that_clients_need() -> None:
    assert request(app(), "GET", "/version").json() == {
        "version": "1.2",
        "protocol": PROTOCOL,
        "rewards": {"mean": {"needs": ["images", "prompts"]}, "letters": {"needs": ["texts"]}},
        "limits": asdict(LIMITS),
    }


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "s3cret", "Basic s3cret", "Bearer s3cret more"])
def test_without_the_token_nothing_is_scored(header: str | None) -> None:
    mean = Mean()
    service, headers = app(mean, token="s3cret"), {} if header is None else {"Authorization": header}
    for answer in (
        post(service, {"prompts": ["a"]}, grey(1), headers=headers),
        request(service, "GET", "/version", headers=headers),
    ):
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "Authorization: Bearer" in answer.json()["error"]
    assert mean.calls == []


@pytest.mark.parametrize("header", ["Bearer s3cret", "bearer s3cret"])
def test_with_the_token_it_is(header: str) -> None:
    answer = post(app(token="s3cret"), {"prompts": ["a"]}, grey(255), headers={"Authorization": header})
    assert answer.json() == {"values": [1.0]}


@pytest.mark.parametrize("token", ["", "two words", "gehé1m", "a\n"])
def test_a_token_that_a_header_cannot_carry(token: str) -> None:
    """The empty token is the most important case: every request without a token would match it."""
    with pytest.raises(ValueError, match="visible ASCII characters"):
        app(token=token)


def test_an_unknown_reward_gets_the_nearest() -> None:
    answer = post(app(), {"prompts": ["a"]}, grey(1), name="maen")
    assert (answer.status_code, answer.json()["error"]) == (
        404,
        "no reward 'maen' here; did you mean 'mean'? It has: mean, letters",
    )


@pytest.mark.parametrize(
    ("ask", "images", "message"),
    [
        ([1], [], "request: Input should be an object"),
        ({}, [], "request: prompts: Field required"),
        ({"prompts": "a"}, [], "request: prompts: "),
        ({"prompts": [1]}, [], "request: prompts.0: "),
        ({"prompts": ["a"], "metadata": [3]}, grey(1), "request: metadata.0: "),
        ({"prompts": ["a"], "weight": 1}, grey(1), "request: weight: Extra"),
        ({"prompts": ["a"], "metadata": []}, grey(1), "0 metadata for 1 prompts; send one for each"),
        ({"prompts": ["a", "b"]}, grey(1), "1 images for 2 prompts"),
        ({"prompts": ["a"]}, grey(1, 2), "2 images for 1 prompts"),
        ({"prompts": ["a"], "texts": ["b"]}, [], "found texts, expected images for reward 'mean'"),
        ({"prompts": ["a"], "texts": ["b"]}, grey(1), "found texts and images, expected images"),
    ],
)
def test_a_request_that_cannot_be_understood(ask: Any, images: Sequence[bytes], message: str) -> None:
    answer = post(app(), ask, images)
    assert answer.status_code == 422
    assert message in answer.json()["error"]


def test_texts_for_an_image_reward_and_the_other_way_round() -> None:
    answer = post(app(), {"prompts": ["a"]}, grey(1), name="letters")
    assert (answer.status_code, answer.json()["error"]) == (422, "found images, expected texts for reward 'letters'")
    answer = post(app(), {"prompts": ["a"], "texts": ["a", "b"]}, name="letters")
    assert answer.json()["error"] == "2 texts for 1 prompts; send one for each"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"json": {"prompts": []}}, "Content-Type is application/json, expected multipart/form-data"),
        ({"content": b"x"}, "Content-Type is none"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "boundary"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, "multipart"),
        ({"files": [("request", (None, b"{"))]}, "request: Invalid JSON"),
        ({"files": [("images", ("0.png", b"x"))]}, "expected one field 'request'"),
        ({"files": [("request", ("r.json", b"{}"))]}, "expected one field 'request'"),
        ({"files": [*form({"prompts": []}), ("weights", ("w.pt", b"x"))]}, "found the parts: request, weights"),
        ({"files": [("images", (None, b"x"))]}, "expected one field 'request'"),
        ({"files": [*form({"prompts": []}), *form({"prompts": []})]}, "Too many fields"),
    ],
)
def test_a_body_of_another_form(content: dict[str, Any], message: str) -> None:
    answer = request(app(), "POST", "/score/mean", **content)
    assert answer.status_code == 422, answer.text
    assert message in answer.json()["error"]


def test_a_bad_image_is_named_by_its_index() -> None:
    answer = post(app(), {"prompts": ["a", "b"]}, [*grey(1), b"\x80\x04]."])
    assert answer.status_code == 422
    assert answer.json() == {
        "error": "image 1: it is not an image that can be read; expected a whole file in PNG or JPEG",
        "index": 1,
    }


def test_the_largest_request_is_taken() -> None:
    assert post(app(), {"prompts": ["a"] * 4}, grey(0, 0, 255, 255)).json() == {"values": [0.0, 0.0, 1.0, 1.0]}


@pytest.mark.parametrize("rows", [5, 6])
def test_too_many_rows(rows: int) -> None:
    for ask, images, name in (
        ({"prompts": ["a"] * rows}, grey(*range(rows)), "mean"),
        ({"prompts": ["a"] * rows, "texts": ["a"] * rows}, [], "letters"),
    ):
        assert post(app(), ask, images, name).status_code == 413


def test_too_many_pixels() -> None:
    answer = post(app(), {"prompts": ["a", "b"]}, grey(1, 2, size=800))
    assert answer.status_code == 413
    assert answer.json()["error"] == "1280000 pixels in 2 images, expected at most 1000000 in a request"


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    answer = post(app(), {"prompts": ["a"]}, [b"x" * 1_100_000])
    assert answer.status_code == 413
    assert "expected at most 1000000; send fewer rows at once" in answer.json()["error"]


def test_bytes_are_counted_without_a_content_length() -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="images"; filename="0.png"\r\n\r\n'
        for _ in range(1000):
            sent += 100_000
            yield b"x" * 100_000

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = request(app(), "POST", "/score/mean", content=body(), headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (413, "more than 1000000 bytes; send fewer rows at once")
    assert sent < 2_000_000


def test_the_error_of_a_reward_has_its_row() -> None:
    answer = post(app(), {"prompts": ["a", "bad"]}, grey(1, 2))
    assert answer.status_code == 500
    said = answer.json()
    assert (said["reward"], said["row"]) == ("mean", 1)
    assert said["error"] == "reward 'mean' failed at row 1 (prompt 'bad'): cannot score this"


def test_a_value_that_is_not_finite_is_a_failure() -> None:
    answer = post(app(), {"prompts": ["nan"]}, grey(1))
    assert answer.status_code == 500
    assert "value nan is not finite" in answer.json()["error"]


def test_requests_are_merged_and_answers_do_not_mix() -> None:
    """There are twelve threads. The first call blocks the reward until the other requests wait."""
    mean = Mean()
    mean.opened.clear()
    service = app(mean, max_batch=64, limits=Limits())

    def ask(level: int) -> httpx.Response:
        prompts = ["bad"] if level == 7 else ["a", "b"]
        return post(service, {"prompts": prompts}, grey(*(level + 20 * row for row in range(len(prompts)))))

    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(ask, 0)
        assert mean.entered.wait(10)
        others = [pool.submit(ask, level) for level in range(1, 12)]
        while request(service, "GET", "/health").json()["rewards"]["mean"]["waiting"] < 21:
            pass
        mean.opened.set()
        answers = [one.result() for one in (first, *others)]
    for level, answer in enumerate(answers):
        if level == 7:
            assert (answer.status_code, answer.json()["row"]) == (500, 0)
        else:
            assert answer.json()["values"] == pytest.approx([level / 255, (level + 20) / 255])
    assert mean.calls[:2] == [2, 21]
    assert sorted(mean.calls[2:]) == [1] + [2] * 10  # the merged call failed, so each was scored by itself


def test_a_full_queue_is_503() -> None:
    mean = Mean()
    mean.opened.clear()
    service = app(mean, limits=Limits(rows=4, waiting=3))
    with ThreadPoolExecutor(2) as pool:
        pool.submit(post, service, {"prompts": ["a"]}, grey(1))
        assert mean.entered.wait(10)
        waiting = pool.submit(post, service, {"prompts": ["a", "b"]}, grey(1, 2))
        while request(service, "GET", "/health").json()["rewards"]["mean"]["waiting"] < 2:
            pass
        answer = post(service, {"prompts": ["a", "b"]}, grey(1, 2))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        mean.opened.set()
        assert waiting.result().status_code == 200


def test_memory_is_bounded_over_all_requests_together() -> None:
    """The budget holds one picture of a megapixel, and not two. The second is refused while the first is scored."""
    mean = Mean()
    mean.opened.clear()
    service = app(mean, limits=Limits(memory=PIXEL_COST + 10, patience=0.0))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, service, {"prompts": ["a"]}, grey(51, size=1000))
        assert mean.entered.wait(10)
        second = post(service, {"prompts": ["a"]}, grey(51, size=1000))
        small = pool.submit(post, service, {"prompts": ["a"]}, grey(0))
        mean.opened.set()
        assert (second.status_code, second.headers["Retry-After"]) == (503, "1")
        assert "72 more are too many" in second.json()["error"]
        assert (small.result().json(), first.result().json()) == ({"values": [0.0]}, {"values": [pytest.approx(0.2)]})
    again = post(service, {"prompts": ["a"]}, grey(51, size=1000))
    assert again.status_code == 200


def test_a_request_waits_for_the_memory_of_others() -> None:
    service = app(Mean(), limits=Limits(memory=PIXEL_COST + 10))
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, service, {"prompts": ["a"]}, grey(51 * n, size=1000)) for n in range(4)]
        assert [one.result().json()["values"] for one in answers] == [[pytest.approx(0.2 * n)] for n in range(4)]


def test_a_request_above_the_whole_budget_is_413() -> None:
    service = app(Mean(), limits=Limits(memory=PIXEL_COST - 1))
    answer = post(service, {"prompts": ["a"]}, grey(51, size=1000))
    assert answer.status_code == 413
    assert "MB of memory, expected at most 71; send fewer rows or smaller images at once" in answer.json()["error"]
    metadata = [{"numbers": [0] * 1_000_000}]
    assert post(service, {"prompts": ["a"], "metadata": metadata}, grey(1)).status_code == 413


class Gone:
    """A request whose client has disconnected."""

    async def is_disconnected(self) -> bool:
        return True


def test_rows_that_are_being_scored_keep_their_memory_when_the_client_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that wait are removed. Rows that are being scored are waited for, because their images are in memory."""
    monkeypatch.setattr(server, "PRESENCE", 0.01)
    request, scores = cast(Request, Gone()), Scores.from_list([0.5])

    async def work() -> None:
        waiting, running = Future[Scores](), Future[Scores]()
        running.set_running_or_notify_cancel()
        with pytest.raises(server.Refusal, match="the client has gone"):
            await server.wait_for_scores(request, waiting)
        assert waiting.cancelled()
        task = asyncio.create_task(server.wait_for_scores(request, running))
        await asyncio.sleep(0.1)
        assert not task.done()
        running.set_result(scores)
        assert await task is scores

    asyncio.run(work())


@pytest.mark.parametrize("place", ["PIL.ImageFile.ImageFile.load", "PIL.Image.open", "rewards.encoding.np.stack"])
def test_a_shortage_of_memory_is_503_and_no_damaged_file(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(place, fail)
    answer = post(app(), {"prompts": ["a"]}, grey(1))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json() == {"error": "there is not enough memory now"}


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "utf-7", "none"])
def test_the_request_does_not_choose_how_it_is_decoded(charset: str) -> None:
    """Python's codecs include some that fail in other ways, and some that take minutes."""
    body = b'--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"prompts": []}\r\n--b--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    assert request(app(), "POST", "/score/mean", content=body, headers=headers).json() == {"values": []}


def test_an_error_that_quotes_the_request_is_cut() -> None:
    answer = post(app(), {"prompts": ["bad"], "metadata": [{"x" * 100_000: 1}], "x" * 100_000: 1}, grey(1))
    assert answer.status_code == 422
    assert len(answer.text) < 3000


def test_json_of_many_levels_is_refused() -> None:
    deep = b'{"prompts": ["a"], "metadata": [{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]}"
    answer = request(app(), "POST", "/score/mean", files=[("request", (None, deep))])
    assert answer.status_code == 422
    assert "recursion limit" in answer.json()["error"]


def test_there_is_nothing_else() -> None:
    for path in ("/", "/docs", "/openapi.json", "/score", "/score/mean/"):
        answer = request(app(), "GET", path)
        where = "expected POST /score/REWARD, GET /health or GET /version"
        assert (answer.status_code, answer.json()) == (404, {"error": f"Not Found: GET {path}; {where}"})


def test_the_error_of_a_wrong_method_names_the_right_ones() -> None:
    answer = request(app(), "GET", "/score/mean")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.json()["error"].startswith("Method Not Allowed: GET /score/mean; expected POST /score/REWARD")
