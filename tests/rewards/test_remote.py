"""Tests of the client against a real server on a loopback port, and against malformed responses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import PerFrame, Remote, Reward, RewardError, Scores, make, score
from rewards.base import all_valid
from rewards.encoding import encode_images
from rewards.http import Connection
from rewards.protocol import PROTOCOL
from rewards.server import Limits, create_app
from tests.loopback import serving

TOKEN = "s3cret"


class Picky:
    """A reward that returns the first pixel of an image or the length of a text. It fails for the prompt "bad"."""

    name = "picky"
    needs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[dict[str, Any]]]] = []

    def to(self, device: torch.device | str) -> Picky:
        return self

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
        self.calls.append((list(prompts), list(metadata)))
        if "bad" in prompts:
            raise RewardError(self.name, "no", prompts.index("bad"), "bad")
        values = samples[:, 0, 0, 0] if isinstance(samples, Tensor) else torch.tensor([len(text) for text in samples])
        return Scores(values, torch.tensor([prompt != "unscorable" for prompt in prompts]))


class FirstFrames(Picky):
    """A reward of whole videos: 10 times the red of the first frame, plus that of the last."""

    name = "first_frames"
    needs: tuple[str, ...] = ("videos",)

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
        return all_valid(10 * samples[:, 0, 0, 0, 0] + samples[:, -1, 0, -1, -1])


picky = Picky()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    served: dict[str, Reward] = {"geneval": make("geneval"), "jpeg": make("jpeg_compressibility"), "picky": picky}
    served["consistency"] = make("consistency", metric="l2")
    served |= {"first_frames": FirstFrames(), "by_frames": PerFrame(make("jpeg_compressibility"), worst=True)}
    limits = Limits(rows=20, megabytes=2, megapixels=2)
    with serving(create_app(served, version="1", token=TOKEN, wait=0.02, limits=limits)) as address:
        yield address


@pytest.fixture
def client(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Remote]]:
    monkeypatch.setenv("TOKEN_OF_TEST", TOKEN)
    made = list[Remote]()

    def connect(reward: str, **options: Any) -> Remote:
        found = make("remote", **{"url": url, "reward": reward, "token_env": "TOKEN_OF_TEST", "retries": 0, **options})
        assert isinstance(found, Remote)
        made.append(found)
        return found

    picky.calls.clear()
    yield connect
    for one in made:
        one.connection.close()  # a server waits for connections that are open


def images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_are_those_of_the_pictures_in_eight_bits(client: Callable[..., Remote], batch_size: int) -> None:
    """They are equal in every bit: PNG is lossless, and JSON can represent every float."""
    drawn, nothing = images(7), [{}] * 7
    eight = (drawn * 255).round() / 255
    for name in ("jpeg", "picky"):
        local = make("jpeg_compressibility") if name == "jpeg" else Picky()
        far = score(client(name, batch_size=batch_size), drawn, [""] * 7, nothing)
        near = score(local, eight, [""] * 7, nothing)
        assert torch.equal(far.values, near.values)
        assert far.valid.all()


def test_geneval_here_and_there(client: Callable[..., Remote], draw: Callable[..., Tensor]) -> None:
    drawn = torch.stack([draw([("circle", "red", 4, 4, 12)]), draw([("square", "blue", 10, 10, 12)]), draw([])])
    red = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    far = score(client("geneval", batch_size=2), drawn, ["a red circle"] * 3, [red, red, {}])
    near = score(make("geneval"), drawn, ["a red circle"] * 3, [red, red, {}])
    assert far.values.tolist() == near.values.tolist() == [1.0, 0.0, 0.0]
    assert far.valid.tolist() == near.valid.tolist() == [True, True, False]


def test_texts_and_metadata_arrive_as_they_are(client: Callable[..., Remote]) -> None:
    prompts, metadata = ["ä“\n", "b", "unscorable"], [{"a": [1, {"b": None}]}, {}, {"c": "é"}]
    found = score(client("picky"), ["x", "", "zzz"], prompts, metadata)
    assert found.values.tolist() == [1.0, 0.0, 0.0]
    assert found.valid.tolist() == [True, True, False]
    assert picky.calls == [(prompts, metadata)]


def test_format_jpeg_sends_jpeg(client: Callable[..., Remote]) -> None:
    drawn = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    exact = score(client("picky"), drawn, ["", ""], [{}, {}]).values
    near = score(client("picky", format="jpeg"), drawn, ["", ""], [{}, {}]).values
    assert exact.tolist() == pytest.approx(near.tolist(), abs=0.03)


def test_no_samples(client: Callable[..., Remote]) -> None:
    assert score(client("picky"), images(0), [], []).values.shape == (0,)


def test_several_clients_are_merged_and_do_not_mix(client: Callable[..., Remote]) -> None:
    """Four threads send sixteen rows in batches of one. The server makes fewer calls, and each client gets its own scores."""
    far = client("picky", batch_size=1, in_flight=4)
    far.check_server()
    start = threading.Barrier(4, timeout=10)

    def ask(seed: int) -> tuple[Tensor, Tensor]:
        drawn = (images(4, seed=seed) * 255).round() / 255
        start.wait()
        return score(far, drawn, [f"{seed}"] * 4, [{}] * 4).values, drawn[:, 0, 0, 0]

    with ThreadPoolExecutor(4) as pool:
        for values, expected in pool.map(ask, range(4)):
            assert torch.equal(values, expected)
    assert sum(len(prompts) for prompts, _ in picky.calls) == 16
    assert max(len(prompts) for prompts, _ in picky.calls) > 1


def test_the_row_of_an_error_is_that_of_the_whole_call(client: Callable[..., Remote], url: str) -> None:
    prompts = ["a", "b", "c", "d", "bad", "e"]
    with pytest.raises(RewardError, match=rf"{url}/score/picky answered 500 .*: reward 'picky' failed.*: no") as caught:
        score(client("picky", batch_size=3), images(6), prompts, [{}] * 6)
    assert (caught.value.name, caught.value.row, caught.value.prompt) == ("remote", 4, "bad")


@pytest.mark.parametrize(
    ("said", "row", "prompt"),
    [
        ({"row": 1}, 3, "d"),
        ({"index": 0}, 2, "c"),
        ({"row": 2}, None, None),
        ({"row": -1}, None, None),
        ({}, None, None),
    ],
)
def test_rows_in_errors_of_the_server_are_numbered_in_the_whole_call(
    said: Any, row: int | None, prompt: str | None
) -> None:
    """The second batch of two fails. An `index` refers to an image. A row outside the batch is ignored."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/version":
            return httpx.Response(200, json={"protocol": PROTOCOL, "rewards": {"far": {}}})
        if b'"c"' in request.content:
            return httpx.Response(422, json={"error": "no", **said})
        return httpx.Response(200, json={"values": [1.0, 1.0]})

    far, _ = client_of(handle, batch_size=2)
    with pytest.raises(RewardError, match="answered 422") as caught:
        score(far, ["1", "2", "3", "4"], ["a", "b", "c", "d"], [{}] * 4)
    assert (caught.value.row, caught.value.prompt) == (row, prompt)


@pytest.mark.parametrize(
    ("reward", "options", "rows", "message"),
    [
        ("pikcy", {}, 1, "has no reward 'pikcy'; did you mean 'picky'. It has: geneval, jpeg, picky"),
        ("picky", {"token_env": None}, 1, "/version answered 401 .*needs its token"),
        ("picky", {"batch_size": 30}, 21, "/score/picky answered 413 .*more than 20 images"),
        ("geneval", {}, 0, "answered 422 .*found texts, expected images"),
    ],
)
def test_a_refusal_of_the_server_is_an_error_with_its_message(
    client: Callable[..., Remote], reward: str, options: dict[str, Any], rows: int, message: str
) -> None:
    samples: Any = images(rows) if rows else ["a text"]
    with pytest.raises(RewardError, match=message):
        score(client(reward, **options), samples, ["p"] * len(samples), [{}] * len(samples))


def test_a_large_request_is_refused_over_a_real_socket(client: Callable[..., Remote]) -> None:
    """The server responds before it has received everything. The response must not be lost with the connection."""
    with pytest.raises(RewardError, match=r"413 .*expected at most 2000000; send fewer rows at once"):
        score(client("picky", batch_size=20), images(20, 512), ["p"] * 20, [{}] * 20)


def test_metadata_that_json_cannot_hold(client: Callable[..., Remote]) -> None:
    for wrong in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(RewardError, match="metadata cannot be sent as JSON"):
            score(client("picky"), ["x"], ["p"], [wrong])


def client_of(handle: Callable[[httpx.Request], httpx.Response], **options: Any) -> tuple[Remote, list[float]]:
    """Return a client of a server with the responses of `handle`, and the list of the client's pauses."""
    client, pauses = Remote(url="http://far", **{"reward": "far", **options}), list[float]()
    transport = httpx.MockTransport(handle)
    client.connection = Connection("remote", "http://far", retries=2, transport=transport, sleep=pauses.append)
    return client, pauses


def fake(*answers: Any, **options: Any) -> tuple[Remote, list[httpx.Request], list[float]]:
    """Return a client of a server with these responses to /score, of which the last repeats."""
    requests, left = list[httpx.Request](), list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/version":
            return httpx.Response(200, json={"protocol": PROTOCOL, "rewards": {"far": {}}})
        requests.append(request)
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return httpx.Response(200, content=content)

    client, pauses = client_of(handle, **options)
    return client, requests, pauses


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"values": [1.0]}, "answered 1 values for 2 rows"),
        ({"values": [1.0, 2.0, 3.0]}, "answered 3 values for 2 rows"),
        (b'{"values": [1.0, NaN]}', "answered the value nan, expected a finite number or null"),
        (b'{"values": [1.0, -Infinity]}', "answered the value -inf"),
        (b'{"values": [1.0, 1e39]}', r"answered the value 1e\+39"),  # infinite in 32 bits
        ({"values": [1.0, "2"]}, "answered the value '2'"),
        ({"values": [1.0, True]}, "answered the value True"),
        ({"values": 3}, 'without a list of "values"'),
        ([1.0, 2.0], 'without a list of "values"'),
        ({}, 'without a list of "values"'),
        (b"<html>", "something that is not JSON: '<html>'"),
    ],
)
def test_a_malformed_response_is_an_error_and_not_requested_again(answer: Any, message: str) -> None:
    far, requests, _ = fake(answer)
    with pytest.raises(RewardError, match=rf"'remote' failed: http://far/score/far .*{message}"):
        score(far, ["a", "b"], ["", ""], [{}, {}])
    assert len(requests) == 1


def test_a_request_that_got_no_answer_is_sent_anew_as_it_was() -> None:
    far, requests, pauses = fake(httpx.ReadTimeout("slow"), httpx.ConnectError("refused"), {"values": [0.5, None]})
    found = score(far, images(2), ["a", "b"], [{}, {}])
    assert (found.values.tolist(), found.valid.tolist()) == ([0.5, 0.0], [True, False])
    assert (len(requests), len(pauses)) == (3, 2)
    bodies = [request.content.split(b"\r\n", 1)[1] for request in requests]  # but for the boundary
    assert all(b"\x89PNG" in body and len(body) == len(bodies[0]) for body in bodies)


def test_a_server_that_never_answers_is_an_error_after_its_retries() -> None:
    far, requests, pauses = fake(httpx.ReadTimeout("slow"))
    with pytest.raises(RewardError, match=r"http://far/score/far: no answer in time: ReadTimeout: slow \(3 attempts\)"):
        score(far, ["a"], [""], [{}])
    assert (len(requests), len(pauses)) == (3, 2)


def test_no_server(url: str) -> None:
    """The port was free just before."""
    with serving(create_app({}, version="1")) as gone:
        pass
    with pytest.raises(RewardError, match=f"{gone}/version: cannot be reached: ConnectError"):
        score(make("remote", url=gone, reward="far", retries=0), ["a"], [""], [{}])


def test_a_slow_reward_meets_the_clients_time_limit() -> None:
    opened = threading.Event()

    class Slow(Picky):
        def __call__(self, samples: Any, prompts: Sequence[str], metadata: Any) -> Scores:
            assert opened.wait(10)
            return super().__call__(samples, prompts, metadata)

    with serving(create_app({"slow": Slow()}, version="1")) as address:
        far = make("remote", url=address, reward="slow", retries=0, timeout=0.2)
        assert isinstance(far, Remote)
        with pytest.raises(RewardError, match="score/slow: no answer in time: TimeoutError"):
            score(far, ["a"], [""], [{}])
        opened.set()
        far.connection.close()


@pytest.mark.parametrize("said", [{"protocol": PROTOCOL + 1, "rewards": {"far": {}}}, {}, [], {"protocol": None}])
def test_another_protocol_is_refused_before_anything_is_sent(said: Any) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/version"
        return httpx.Response(200, json=said)

    far, _ = client_of(handle)
    with pytest.raises(RewardError, match=rf"http://far has protocol .*, expected {PROTOCOL}; use the same version"):
        score(far, ["a"], [""], [{}])


def test_the_version_is_requested_once() -> None:
    asked = list[str]()

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        known = {"protocol": PROTOCOL, "rewards": {"far": {}}}
        return httpx.Response(200, json=known if request.url.path == "/version" else {"values": [1.0]})

    far, _ = client_of(handle, batch_size=1)
    for _ in range(2):
        score(far, ["a", "b"], ["", ""], [{}, {}])
    assert sorted(asked) == ["/score/far"] * 4 + ["/version"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"in_flight": 0}, "in_flight is 0"),
        ({"format": "webp"}, "format is 'webp', expected one of png, jpeg"),
        ({"url": "here"}, "expected a URL such as"),
        ({"token_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE, which is not set"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("remote", **{"url": "http://far", "reward": "far", **options})


def test_input_images_and_masks_reach_the_server(client: Callable[..., Remote], tmp_path: Path) -> None:
    """Files of several sizes and formats, one in all batches. The reward finds copies, which are gone after the answer."""
    drawn = images(5)
    for name in ("a.webp", "b.tiff", "mask.png"):
        Image.effect_noise((16, 16 if name < "b" else 24), 90).convert("RGB").save(tmp_path / name, lossless=True)
    one, two, mask = (str(tmp_path / name) for name in ("a.webp", "b.tiff", "mask.png"))
    metadata = [{"image": one}, {"image": two, "n": 1}, {"image": one, "mask": mask}, {"image": one}, {"image": two}]
    local = score(make("consistency", metric="l2"), (drawn * 255).round() / 255, ["x"] * 5, metadata)
    found = score(client("consistency", batch_size=2), drawn, ["x"] * 5, metadata)
    assert torch.equal(found.values, local.values)
    score(client("picky"), drawn, ["x"] * 5, metadata)
    rows = [row for _, rows in picky.calls for row in rows]
    assert rows[1]["n"] == 1
    assert rows[0]["image"] == rows[2]["image"] == rows[3]["image"] != rows[1]["image"]
    assert not any(Path(row["image"]).exists() for row in rows)


def test_paths_that_are_no_images_stay_text_or_are_refused(client: Callable[..., Remote], tmp_path: Path) -> None:
    """A path of the client's machine would name a file of the server's. For texts `image` is metadata like any other."""
    with pytest.raises(
        RewardError, match=r"`image` in the metadata is a path, which means nothing here; send 'inputs'"
    ):
        score(client("picky"), images(1), ["x"], [{"image": str(tmp_path / "none.png")}])
    score(client("picky"), images(1), ["x"], [{"image": "photo of a cat"}])
    score(client("picky"), ["a text"], ["x"], [{"image": "/plot.svg"}])
    assert [rows for _, rows in picky.calls] == [[{"image": "photo of a cat"}], [{"image": "/plot.svg"}]]


@pytest.mark.parametrize(
    ("inputs", "files", "status", "problem"),
    [
        ([{"image": 1}], [b""], 422, "an empty file"),
        ([{"image": 1}], None, 422, "number 1 of 1 files 'inputs'; numbers begin with 0"),
        ([{"image": -1}], None, 422, "number -1 of 1 files 'inputs'"),
        ([{"picture": 0}], None, 422, "request: inputs.0.picture"),
        ([{}, {}], None, 422, "2 inputs for 1 prompts; send one for each"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    url: str, inputs: object, files: list[bytes] | None, status: int, problem: str
) -> None:
    (picture,) = encode_images(images(1), "png")
    request = json.dumps({"prompts": ["x"], "inputs": inputs})
    parts: list[tuple[str, Any]] = [("request", (None, request)), ("images", ("0.png", picture))]
    parts += [("inputs", ("0.png", file)) for file in files or [picture]]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.post(f"{url}/score/picky", files=parts, headers=headers)
    assert (answer.status_code, problem in answer.json()["error"]) == (status, True), answer.text


def test_videos_arrive_as_they_were_sent(client: Callable[..., Remote]) -> None:
    videos = torch.randint(0, 256, (5, 3, 3, 6, 4), generator=torch.Generator().manual_seed(0)) / 255
    found = score(client("first_frames", batch_size=2), videos, ["a"] * 5, [{}] * 5)
    torch.testing.assert_close(found.values, 10 * videos[:, 0, 0, 0, 0] + videos[:, -1, 0, -1, -1])
    here = PerFrame(make("jpeg_compressibility"), worst=True)
    there = score(client("by_frames"), videos, ["a"] * 5, [{}] * 5)
    assert there.values.tolist() == score(here, videos, ["a"] * 5, [{}] * 5).values.tolist()


def test_a_video_for_a_reward_of_images_is_refused(client: Callable[..., Remote]) -> None:
    with pytest.raises(RewardError, match="found videos, expected images for reward 'geneval'"):
        score(client("geneval"), torch.rand(1, 2, 3, 8, 8), ["a"], [{}])
    with pytest.raises(RewardError, match="found images, expected videos for reward 'first_frames'"):
        score(client("first_frames"), torch.rand(1, 3, 8, 8), ["a"], [{}])
