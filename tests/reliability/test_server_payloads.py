"""Requests of every malformed kind: the server never answers 500, answers the next good request, and keeps to its memory."""

from __future__ import annotations

import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from rewards import make, score
from rewards.server import DeadlineProtocol, Limits, create_app
from tests.loopback import serving
from tests.reliability.tally import Tally

BOUNDARY = b"xxBOUNDARYxx"
LIMITS = Limits(rows=8, megabytes=1, megapixels=1, memory=200, seconds=0.3)
REWARDS = {"jpeg": "jpeg_compressibility", "shapes": "geneval", "match": "exact_match"}
ODD = [
    None, True, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "", "\ud800", "\x00\x1b[2J", "𝔸" * 1000, [], {}, [[]],
    [{}], {"class": 1}, [{"class": "circle", "count": "2"}], [{"class": "circle", "count": 1, "position": [1]}], ["a"] * 9,
]  # fmt: skip


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


GOOD = encoded(noise((16, 16)), "PNG")
TEXT = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1_000_000)))
PROFILE = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1_000_000)))
IMAGES = [
    GOOD,
    encoded(noise((16, 16)), "JPEG"),
    encoded(noise((16, 16)).convert("L"), "PNG"),
    encoded(noise((16, 16)).convert("P"), "PNG"),
    encoded(noise((16, 16)).convert("CMYK"), "JPEG"),
    encoded(Image.new("RGBA", (16, 16)), "PNG"),
    encoded(Image.new("I;16", (16, 16), 40_000), "PNG"),
    encoded(noise((16, 16)), "PNG", save_all=True, append_images=[noise((16, 16), 1)]),
    encoded(noise((16, 16)), "GIF"),
    encoded(noise((16, 16)), "WEBP"),
    encoded(noise((16, 16)), "TIFF"),
    encoded(Image.new("1", (900, 1100)), "PNG"),
    encoded(Image.new("1", (1, 1_000_000)), "PNG"),
    encoded(Image.new("1", (1001, 1000)), "PNG"),
    encoded(Image.new("1", (20_000, 20_000)), "PNG"),
    encoded(noise((1, 1)), "PNG"),
    GOOD[:33] + 50 * TEXT + GOOD[33:],
    GOOD[:33] + PROFILE + GOOD[33:],
    GOOD[:16] + (0).to_bytes(4, "big") + GOOD[20:],
    GOOD[:8] + chunk(b"IHDR", b"\xff" * 8 + bytes([8, 2, 0, 0, 0])) + GOOD[33:],
    b"",
    b"\x80\x04]\x94.",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
]


def multipart(parts: list[tuple[bytes, bytes]]) -> bytes:
    """Return a body of parts, each with its headers and its content."""
    return b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (BOUNDARY, *part) for part in parts) + b"--%b--\r\n" % BOUNDARY


def field(ask: object) -> tuple[bytes, bytes]:
    text = ask if isinstance(ask, bytes) else json.dumps(ask).encode()
    return b'Content-Disposition: form-data; name="request"', text


def image_part(data: bytes) -> tuple[bytes, bytes]:
    return b'Content-Disposition: form-data; name="images"; filename="a.png"', data


def head(name: str, body: bytes, **changed: bytes) -> bytes:
    lines = {
        "start": b"POST /score/%b HTTP/1.1" % name.encode(),
        "host": b"Host: here",
        "type": b"Content-Type: multipart/form-data; boundary=%b" % BOUNDARY,
        "length": b"Content-Length: %d" % len(body),
        "close": b"Connection: close",
        **changed,
    }
    return b"\r\n".join(line for line in lines.values() if line) + b"\r\n\r\n"


def valid(rng: random.Random) -> tuple[str, dict[str, object], list[bytes]]:
    """Return a reward, and the JSON and images of a valid request for it."""
    name, rows = rng.choice([*REWARDS]), rng.randint(0, 4)
    ask: dict[str, object] = {"prompts": ["a red circle"] * rows}
    if name == "match":
        return name, ask | {"texts": ["42"] * rows, "metadata": [{"answer": 42}] * rows}, []
    if rng.random() < 0.7:
        ask["metadata"] = [{"include": [{"class": "circle", "count": 1}]}] * rows
    return name, ask, [GOOD] * rows


def other_types(rng: random.Random) -> bytes:
    name, ask, images = valid(rng)
    for _ in range(rng.randint(1, 3)):
        place, value = rng.choice(["prompts", "metadata", "texts", "other", "row", "item"]), rng.choice(ODD)
        prompts = ask.get("prompts")
        if place == "row" and isinstance(prompts, list):
            ask["metadata"] = [{rng.choice(["include", "exclude", "answer", "tag"]): value} for _ in prompts]
        elif place == "item" and isinstance(prompts, list):
            ask["prompts"] = [*prompts[1:], value]
        else:
            ask[place] = value
    body = multipart([field(ask), *map(image_part, images)])
    return head(name, body) + body


def odd_json(rng: random.Random) -> bytes:
    deep = rng.choice([100, 250, 100_000])
    text = rng.choice(
        [
            b"", b"null", b"[", b'"', b"\xff\xfe{}", b'{"prompts": ["\\ud800"]}', b'{"prompts": [], "prompts": [1]}',
            b'{"prompts": ["a"], "metadata": [{"a": ' + b"[" * deep + b"]" * deep + b"}]}", b"[" * deep,
            b'{"prompts": ["a"], "metadata": [{"a": ' + b"9" * 6000 + b"}]}", b'{"prompts": ' + b" " * 300_000 + b"[]}",
            b'{"prompts": ["a"], "metadata": [' + b"{}," * 100_000 + b"{}]}", b'{"prompts": [' + b'"",' * 100_000 + b'""]}',
            b'{"prompts": ["a"], "metadata": [{"a": [' + b"[]," * 200_000 + b"[]]}]}",
        ]
    )  # fmt: skip
    body = multipart([field(text), image_part(GOOD)])
    return head(rng.choice([*REWARDS]), body) + body


def odd_images(rng: random.Random) -> bytes:
    images = [rng.choice(IMAGES) for _ in range(rng.randint(1, 8))]
    if rng.random() < 0.5:
        images = [images[0]] * len(images)
    if rng.random() < 0.4:
        where = rng.randrange(len(images))
        images[where] = images[where][: rng.randint(0, len(images[where]))]
    if rng.random() < 0.4:
        where = rng.randrange(len(images))
        damaged = bytearray(images[where][:5000])
        for _ in range(rng.randint(1, 20) if damaged else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        images[where] = bytes(damaged)
    body = multipart([field({"prompts": ["a"] * len(images)}), *map(image_part, images)])
    return head(rng.choice(["jpeg", "shapes"]), body) + body


def damaged_bytes(rng: random.Random) -> bytes:
    name, ask, images = valid(rng)
    body = multipart([field(ask), *map(image_part, images)])
    whole = bytearray(head(name, body) + body)
    for _ in range(rng.randint(1, 30)):
        kind, place = rng.randrange(3), rng.randrange(len(whole))
        if kind == 0:
            whole[place] = rng.randrange(256)
        elif kind == 1:
            del whole[place : place + rng.randint(1, 40)]
        else:
            whole[place:place] = rng.randbytes(rng.randint(1, 40))
        if not whole:
            break
    return bytes(whole[: rng.randint(0, len(whole))] if rng.random() < 0.3 else whole)


def odd_heads(rng: random.Random) -> bytes:
    name, ask, images = valid(rng)
    body = multipart([field(ask), *map(image_part, images)])
    changed: dict[str, bytes] = {}
    for _ in range(rng.randint(1, 3)):
        key, lines = rng.choice([*ODD_HEADS.items()])
        changed[key] = rng.choice(lines)
    return head(name, body, **changed) + body


ODD_HEADS = {
    "start": [
        b"GET /score/jpeg HTTP/1.1", b"PUT /score/jpeg HTTP/1.1", b"POST /score/ HTTP/1.1", b"POST /score/%ff%00 HTTP/1.1",
        b"POST /score/" + b"x" * 30_000 + b" HTTP/1.1", b"POST http://other/score/jpeg HTTP/1.1", b"POST * HTTP/1.1",
        b"POST /score/jpeg HTTP/1.0", b"POST /score/jpeg HTTP/9.9", b"POST /score/jpeg/../match HTTP/1.1", b"",
        b"OPTIONS * HTTP/1.1", b"GET /health?x=%zz HTTP/1.1", b"GET /version HTTP/1.1",
    ],
    "type": [
        b"Content-Type: application/json", b"Content-Type:", b"", b"Content-Type: multipart/form-data",
        b"Content-Type: multipart/form-data; boundary=", b'Content-Type: multipart/form-data; boundary="\\"',
        b"Content-Type: multipart/form-data; boundary=" + b"b" * 5000,
        *(b"Content-Type: multipart/form-data; boundary=%b; charset=%b" % (BOUNDARY, name)
          for name in (b"undefined", b"punycode", b"idna", b"utf-16", b"none", b"\xff")),
    ],
    "length": [
        b"", b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 1e3",
        b"Content-Length: 99999999999999999999999", b"Content-Length: 999999", b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip, chunked", b"Content-Length: 10\r\nContent-Length: 11",
    ],
    "host": [b"", b"Host:", b"Host: \xff", b"X: " + b"x" * 70_000, b"\r\n".join(b"X-%d: x" % n for n in range(2000))],
    "close": [
        b"Authorization: Bearer \xff", b"Upgrade: websocket\r\nConnection: Upgrade", b"Expect: 100-continue",
        b"Content-Encoding: gzip", b"Connection: close\r\n folded",
    ],
}  # fmt: skip


def odd_parts(rng: random.Random) -> bytes:
    name, ask, images = valid(rng)
    parts = [field(ask), *map(image_part, images)]
    odd = [
        field(ask),
        (b"", b"x"),
        (b"Content-Disposition: form-data", b"x"),
        (b'Content-Disposition: form-data; name="weights"; filename="w.pt"', b"x"),
        (b'Content-Disposition: form-data; name="images"', GOOD),
        (b'Content-Disposition: form-data; name="request"; filename="r"', b"{}"),
        (b'Content-Disposition: form-data; name="\xff\xfe"', b"x"),
        (b"Content-Disposition: " + b"x" * 10_000, b"x"),
        (b"\r\n".join(b"X-%d: x" % n for n in range(50)), b"x"),
        *[image_part(b"")] * 300,
        image_part(bytes(1_100_000)),
    ]
    for _ in range(rng.randint(1, 12)):
        parts.insert(rng.randint(0, len(parts)), rng.choice(odd))
    rng.shuffle(parts)
    body = multipart(parts)
    return head(name, body) + body


def garbage(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 50, 5000, 200_000]))


KINDS = [other_types, odd_json, odd_images, damaged_bytes, odd_heads, odd_parts, garbage]


def send(address: str, request: bytes) -> bytes:
    """Return all that the server sends to a client which sends a request, and then waits."""
    parts, found = urlsplit(address), b""
    with (
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as peer,
        suppress(ConnectionError),
    ):
        with suppress(ConnectionError):
            peer.sendall(request)
        while part := peer.recv(65536):
            found += part
    return found


def check_alive(client: httpx.Client, image_value: float) -> None:
    ask = {"prompts": ["a", "b"], "texts": ["42", "41"], "metadata": [{"answer": 42}] * 2}
    answer = client.post("/score/match", files=[("request", (None, json.dumps(ask)))])
    assert answer.json() == {"values": [1.0, 0.0]}
    answer = client.post("/score/jpeg", files=[("request", (None, b'{"prompts": ["a"]}')), ("images", ("a.png", GOOD))])
    assert answer.json() == {"values": [image_value]}


def test_malformed_requests(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is answered 500, and the next good one is answered well."""
    monkeypatch.setattr(DeadlineProtocol, "seconds", 0.3)  # a client that waits for no more is cut off soon
    rewards = {name: make(reward) for name, reward in REWARDS.items()}
    picture = torch.from_numpy(np.array(Image.open(io.BytesIO(GOOD)))).permute(2, 0, 1)[None] / 255
    value = float(score(rewards["jpeg"], picture, ["a"], [{}]).values)
    with (
        serving(create_app(rewards, version="1", limits=LIMITS, wait=0.0)) as address,
        httpx.Client(base_url=address, timeout=60, headers={"Connection": "close"}) as client,
    ):
        check_alive(client, value)
        for index in tally.trials(short=35, long=10_000):
            kind = KINDS[index % len(KINDS)]
            with tally.trial(f"{kind.__name__} {index}"):
                found = send(address, kind(random.Random(index)))
                status = re.match(rb"HTTP/1.1 (\d+)", found)
                assert not found or status is not None, found[:100]
                assert status is None or int(status[1]) != 500, found[-500:]
                check_alive(client, value)


@contextmanager
def process() -> Iterator[tuple[str, Callable[[], float]]]:
    """A server in a process of its own: its address, and a function that returns its largest memory so far in MB."""
    code = "import sys; from difrl.cli import main; sys.argv[0] = 'difrl'; main()"
    options = ["--port", "0", "--max-pixels", "2", "--max-size", "3", "--max-memory", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", code, "serve", "jpeg_compressibility", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None

        def peak() -> float:
            with open(f"/proc/{server.pid}/status", encoding="ascii") as status:
                match = re.search(r"VmHWM:\s+(\d+)", status.read())
            assert match is not None
            return int(match[1]) / 1e3

        try:
            yield found[0], peak
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory of a process from /proc")
def test_memory(tally: Tally) -> None:
    """Requests that are large in every way arrive together; the process never takes more than its budget beside its start."""
    large = [
        [encoded(Image.new("RGB", (1400, 1400), (9, 99, 200)), "PNG")],
        [encoded(noise((800, 800)), "JPEG")] * 3,
        [encoded(Image.new("1", (500, 4000)), "PNG")],
        [GOOD[:33] + 500 * TEXT + GOOD[33:]] * 6,
        [GOOD[:33] + PROFILE + GOOD[33:]] * 200,
        [encoded(Image.new("L", (88, 88)), "PNG")] * 256,
    ]
    nested = b'{"prompts": ["a"], "metadata": [{"a": [' + b"[]," * 900_000 + b"[]]}]}"
    with (
        process() as (address, peak),
        httpx.Client(base_url=address, timeout=120) as client,
        ThreadPoolExecutor(8) as pool,
    ):

        def post(case: int) -> int:
            images = large[case % len(large)]
            text = nested if case % 7 == 6 else json.dumps({"prompts": ["a"] * len(images)}).encode()
            files = [("request", (None, text)), *(("images", ("a.png", image)) for image in images)]
            return client.post("/score/jpeg_compressibility", files=files).status_code

        assert post(0) == 200
        start = peak()
        for index in tally.trials(short=1, long=30):
            with tally.trial(f"round {index} of 14 requests"):
                found = list(pool.map(post, range(14 * index, 14 * (index + 1))))
                assert set(found) <= {200, 413, 422, 503}, found
                assert 200 in found
                assert peak() < start + 300, f"{peak():.0f} MB, {start:.0f} MB at the start"
