from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from rewards import RewardError
from rewards.http import (
    FIRST_PAUSE,
    Connection,
    HttpError,
    _loop,
    _start_loop,
    is_loopback,
    map_concurrently,
    read_secret,
)

Answer = httpx.Response | Exception


class Script:
    """A transport with scripted responses, of which the last repeats. It records requests and pauses."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.requests, self.pauses = list(answers), list[httpx.Request](), list[float]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def connection(self, retries: int = 3, uniform: Callable[[float, float], float] = max, **named: str) -> Connection:
        return Connection(
            "far",
            "http://far.example/api/",
            retries=retries,
            transport=httpx.MockTransport(self),
            sleep=self.pauses.append,
            uniform=uniform,
            **named,  # type: ignore[arg-type]
        )


def ok(**content: object) -> httpx.Response:
    return httpx.Response(200, json=content)


PASSING: list[Answer] = [
    httpx.ConnectError("refused"),
    httpx.ReadError("reset"),
    httpx.ReadTimeout("slow"),
    httpx.ConnectTimeout("slow"),
    httpx.RemoteProtocolError("gone"),
    *(httpx.Response(status) for status in (429, 502, 503, 504)),
]


@pytest.mark.parametrize("answer", PASSING, ids=repr)
def test_temporary_failures_are_repeated(answer: Answer) -> None:
    script = Script(answer, ok(a=1))
    assert script.connection().get("/x") == {"a": 1}
    assert [str(request.url) for request in script.requests] == ["http://far.example/api/x"] * 2
    assert len(script.pauses) == 1


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422, 500])
def test_permanent_failures_are_not_repeated(status: int) -> None:
    script = Script(httpx.Response(status, json={"error": "so it is"}))
    with pytest.raises(
        HttpError, match=rf"'far' failed: http://far\.example/api/x answered {status} .*: so it is"
    ) as e:
        script.connection().get("/x")
    assert (len(script.requests), script.pauses) == (1, [])
    assert (e.value.status, e.value.detail) == (status, {"error": "so it is"})


def test_pauses_double_up_to_a_limit_and_are_drawn_from_their_upper_half() -> None:
    ranges: list[tuple[float, float]] = []
    script = Script(httpx.Response(503))

    def lowest(low: float, high: float) -> float:
        ranges.append((low, high))
        return low

    with pytest.raises(HttpError, match="answered 503 \\(10 attempts\\)"):
        script.connection(retries=9, uniform=lowest).get("/x")
    assert [high for _, high in ranges] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert [low for low, _ in ranges] == script.pauses == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("said", "pause"), [("7", 7.0), ("0.1", 0.5), ("900", 60.0), ("-5", 0.5), ("Sat, 21 Nov 2026 07:28:00 GMT", 0.5)]
)
def test_retry_after_is_heeded(said: str, pause: float) -> None:
    script = Script(httpx.Response(429, headers={"Retry-After": said}), ok())
    script.connection().get("/x")
    assert script.pauses == [pause]


def test_the_last_failure_is_raised() -> None:
    script = Script(httpx.ConnectError("connection refused"))
    with pytest.raises(RewardError, match=r"api/x: cannot be reached: ConnectError: connection refused \(4 attempts\)"):
        script.connection().get("/x")
    assert len(script.requests) == 4
    with pytest.raises(RewardError, match=r"no answer in time: ReadTimeout: slow \(1 attempt\)"):
        Script(httpx.ReadTimeout("slow")).connection(retries=0).get("/x")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(400, json={"error": {"message": "no such model", "code": 3}}), "no such model"),
        (httpx.Response(404, json={"detail": "Not Found"}), "Not Found"),
        (httpx.Response(400, text="plain words"), "plain words"),
        (httpx.Response(400, json=["a"]), "a"),
        (httpx.Response(400), "Bad Request"),
        (httpx.Response(200, text="<html>"), "answered something that is not JSON: '<html>'"),
        (httpx.Response(200, content=b"\xff\xfe{"), "answered something that is not JSON"),
    ],
)
def test_the_other_sides_message_is_passed_on(answer: httpx.Response, message: str) -> None:
    with pytest.raises(HttpError, match=message):
        Script(answer).connection().post("/x", json={})


def test_the_token_is_sent_and_never_shown() -> None:
    script = Script(httpx.Response(401, json={"error": "wrong"}))
    with pytest.raises(HttpError) as caught:
        script.connection(token="s3cret").get("/x")
    assert script.requests[0].headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value)
    with pytest.raises(HttpError):
        (without := Script(httpx.Response(401))).connection().get("/x")
    assert "Authorization" not in without.requests[0].headers


@pytest.mark.parametrize("url", ["", "far.example", "ftp://far.example", "http://", "http://a:b@c", "http://a?b=1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"'far'.*URL"):
        Connection("far", url)


def test_a_time_limit_and_retries_out_of_range() -> None:
    for wrong in ({"timeout": 0.0}, {"retries": -1}):
        with pytest.raises(ValueError, match=r"timeout is .* and retries"):
            Connection("far", "http://far.example", **wrong)  # type: ignore[arg-type]


def test_secrets_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_TOKEN", "abc")
    assert read_secret("FAR_TOKEN", "far", "token_env") == "abc"
    assert read_secret(None, "far", "token_env") is None
    monkeypatch.setenv("FAR_TOKEN", "abc\n")
    with pytest.raises(ValueError, match="'far': FAR_TOKEN contains spaces or other characters"):
        read_secret("FAR_TOKEN", "far", "token_env")
    monkeypatch.delenv("FAR_TOKEN")
    with pytest.raises(ValueError, match="'far': token_env names the environment variable FAR_TOKEN, which is not set"):
        read_secret("FAR_TOKEN", "far", "token_env")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((one, True) for one in ("127.0.0.1", "127.8.9.1", "::1", "localhost")),
        *((one, False) for one in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")),
    ],
)
def test_addresses_of_this_machine_alone(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_items_are_done_at_once_and_returned_in_order() -> None:
    both = threading.Barrier(2, timeout=10)

    def slow(item: int) -> int:
        both.wait()  # passes only with two threads at a time
        time.sleep(0.01 * (4 - item))
        return item * item

    assert map_concurrently(slow, range(4), 2) == [0, 1, 4, 9]
    assert map_concurrently(slow, [], 2) == []


def test_after_an_error_nothing_new_is_begun() -> None:
    begun: list[int] = []

    def fail(item: int) -> int:
        begun.append(item)
        if item == 0:
            raise RewardError("far", "broken")
        time.sleep(0.05)
        return item

    with pytest.raises(RewardError, match="broken"):
        map_concurrently(fail, range(50), 2)
    assert len(begun) < 10


def test_pauses_leave_the_global_generator_alone() -> None:
    before, pauses = random.getstate(), list[float]()
    transport = httpx.MockTransport(Script(httpx.Response(503), ok(a=1)))
    connection = Connection("far", "http://far.example", transport=transport, sleep=pauses.append)
    assert connection.get("/x") == {"a": 1}
    assert FIRST_PAUSE / 2 <= pauses[0] <= FIRST_PAUSE
    assert random.getstate() == before


def test_first_requests_of_several_threads_share_one_event_loop() -> None:
    _start_loop.cache_clear()
    started = threading.Barrier(8)

    def first(_: int) -> object:
        started.wait(60)
        return _loop()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(first, range(8)))) == 1
