"""Rewards as a service, for rewards with an environment or a GPU of their own.

    POST /score/REWARD   multipart/form-data: a field `request` with JSON {"prompts": […], "metadata": […]}, and a file
                         `images` (PNG or JPEG) for each prompt, or "texts": […] in the JSON instead. With "frames": F in the
                         JSON, each picture is a video: its F frames, one below the other. Input images of edits are files
                         `inputs`; "inputs": [{"image": 0, "mask": 1}, …] has their numbers for each prompt
                         → {"values": [0.5, null, …]}, null for a row that could not be scored
    GET  /health         whether requests are accepted, and the state of each reward; needs no token
    GET  /version        versions of the program and of this protocol, the rewards, the limits of a request

Errors have the body {"error": …} and the status 401 without the token, 404 for an unknown reward or address, 405 for
another method, 408 for a body that does not arrive in time, 413 for a request that is too large, 422 for one that cannot
be parsed (with the `index` of a bad image, or the `row` of metadata that the reward cannot read), 500 where the reward
failed (with the `row`), or 503 while the queue is full or memory is short. Nothing is ever unpickled: images are PNG or
JPEG files, and everything else is JSON.

The memory of all requests together is bounded by a `MemoryBudget`, from which a request takes bytes before it uses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hmac
import os
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal, cast

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from rewards.base import MetadataError, Reward, RewardError, Scores
from rewards.batching import Batcher, Busy
from rewards.encoding import BadImage, count_pixels, decode_images, from_strips
from rewards.image_files import TooManyPixels
from rewards.input_images import IMAGE, MASK
from rewards.memory import MemoryBudget, OverBudget, Shortage
from rewards.protocol import PROTOCOL, is_token

Take = Callable[[int], Awaitable[None]]
"""The function of a request's share of the memory, which takes bytes."""
ADDRESSES = "expected POST /score/REWARD, GET /health or GET /version"
PRESENCE = 1.0
"""Seconds between two looks at whether a client is still there."""
LONGEST_ERROR = 2000
"""Characters of an error: it may quote the request."""
GRACE = 30
"""Seconds that requests in progress have left when the server is stopped."""
BODY_COST, JSON_COST, PIXEL_COST = 3, 40, 72
"""Bytes of memory for a byte of the body, for one of its JSON, and for a pixel: measured at their worst.

A byte of the body is in the form, in the file's bytes and in the decoder. A pixel is decoded to 3 bytes and to 12 as
floats, and rewards make copies.
"""


@dataclass(frozen=True)
class Limits:
    """Limits of a request's size, and of the queue."""

    rows: int = 256
    megabytes: int = 64  # of the body
    megapixels: int = 64  # of all its images, decoded
    waiting: int = 1024  # rows of all requests for one reward
    memory: int = 5000  # megabytes of all requests together
    seconds: float = 60.0  # until the body of a request has arrived
    patience: float = 10.0  # seconds that a request waits for memory


class ScoreRequest(BaseModel):
    """The JSON of a request: a prompt for each row, and optionally metadata, and texts or the number of frames of videos."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: list[str]
    metadata: list[dict[str, object]] | None = None
    texts: list[str] | None = None
    frames: int | None = Field(None, ge=1)
    inputs: list[dict[Literal["image", "mask"], int]] | None = None
    """Numbers of the files `inputs` whose paths the metadata of each row get."""


class Refusal(Exception):
    """An error response to a request."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None, **detail: object) -> None:
        super().__init__(error)
        self.status, self.headers, self.content = status, headers, {"error": error[:LONGEST_ERROR], **detail}


def create_app(
    rewards: Mapping[str, Reward],
    *,
    version: str,
    token: str | None = None,
    max_batch: int = 64,
    wait: float = 0.005,
    limits: Limits | None = None,
) -> FastAPI:
    """Build the service of these rewards. `max_batch` and `wait` (seconds) are those of `Batcher`."""
    if token is not None and not is_token(token):
        raise ValueError("a token is one or more visible ASCII characters, without spaces; found another")
    limits = limits or Limits()
    batchers = {
        name: Batcher(reward, max_batch=max_batch, wait=wait, most_waiting=limits.waiting)
        for name, reward in rewards.items()
    }
    budget = MemoryBudget(limits.memory * 10**6, limits.patience)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for batcher in batchers.values():
            batcher.close()

    app = FastAPI(
        title="difrl rewards",
        version=version,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            Refusal: _handle_refusal,
            HTTPException: _handle_unknown_address,
            OverBudget: _handle_over_budget,
            **dict.fromkeys((Busy, Shortage, MemoryError), _handle_shortage),
        },
    )

    @app.get("/health")
    async def health() -> JSONResponse:
        ready = all(batcher.alive for batcher in batchers.values())
        states = {
            name: {"loaded": one.answered > 0, "answered": one.answered, "waiting": one.waiting}
            for name, one in batchers.items()
        }
        return JSONResponse({"ready": ready, "rewards": states}, 200 if ready else 503)

    @app.get("/version")
    async def about(request: Request) -> dict[str, object]:
        check_token(request, token)
        needs = {name: {"needs": list(reward.needs)} for name, reward in rewards.items()}
        return {"version": version, "protocol": PROTOCOL, "rewards": needs, "limits": asdict(limits)}

    @app.post("/score/{name}")
    async def score(name: str, request: Request) -> dict[str, list[float | None]]:
        check_token(request, token)
        if name not in batchers:
            raise Refusal(404, f"no reward '{name}' here; {_describe_names(name, batchers)}")
        async with budget.share() as take, contextlib.AsyncExitStack() as stack:
            body, files, inputs = await read_request(request, limits, take)
            check_samples(body, files, rewards[name])
            if not body.prompts:
                return {"values": []}
            folder = stack.enter_context(TemporaryDirectory(prefix="difrl-inputs-")) if inputs else ""
            metadata = await store_inputs(body, inputs, Path(folder), limits, take)
            samples = await decode_files(files, body.frames, limits, take) if body.texts is None else body.texts
            job = batchers[name].submit(samples, body.prompts, metadata)
            del body, files, inputs, samples
            try:
                scores = await wait_for_scores(request, job)
            except RewardError as error:
                status = 422 if isinstance(error, MetadataError) else 500
                raise Refusal(status, str(error), reward=name, row=error.row) from error
        rows = zip(scores.values.tolist(), scores.valid.tolist(), strict=True)
        return {"values": [value if valid else None for value, valid in rows]}

    return app


def check_token(request: Request, token: str | None) -> None:
    """Refuse a request without the token. The time of the comparison does not depend on the request's token."""
    if token is None:
        return
    scheme, _, found = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(found.strip().encode(), token.encode()):
        problem = "this server needs its token: Authorization: Bearer …"
        raise Refusal(401, problem, {"WWW-Authenticate": "Bearer"})


async def read_request(request: Request, limits: Limits, take: Take) -> tuple[ScoreRequest, list[bytes], list[bytes]]:
    """Return the JSON, the images and the input images of a request.

    No more than the limit is read, and not for longer than it allows.
    """
    max_bytes = limits.megabytes * 10**6
    length = request.headers.get("Content-Length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise Refusal(413, f"{length[:20]} bytes, expected at most {max_bytes}; send fewer rows at once")
    parser = MultiPartParser(
        _multipart_header(request.headers.get("Content-Type", "none")),
        _stream_body(request, max_bytes, take),
        max_files=3 * limits.rows,  # an image, an input image and a mask for each row
        max_fields=1,
        max_part_size=max_bytes,
    )
    parser.spool_max_size = max_bytes  # in memory, which is counted, and not on a disk that may be full
    try:
        async with asyncio.timeout(limits.seconds):
            form = await parser.parse()
    except TimeoutError as error:
        raise Refusal(408, f"the request did not arrive within {limits.seconds:g} seconds; send fewer rows") from error
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise Refusal(413, f"more than {3 * limits.rows} files; send fewer rows at once") from error
        raise Refusal(422, error.message) from error
    except ClientDisconnect as error:
        raise Refusal(400, "the request ended before its end") from error
    try:
        fields, files, inputs = (form.getlist(name) for name in ("request", "images", "inputs"))
        known = len(fields) + len(files) + len(inputs)
        if known < len(form.multi_items()) or len(fields) != 1 or not isinstance(fields[0], str):
            parts = ", ".join(sorted({name for name, _ in form.multi_items()})) or "none"
            raise Refusal(422, f"expected one field 'request' with JSON, and files 'images'; found the parts: {parts}")
        if not all(isinstance(file, UploadFile) for file in [*files, *inputs]):
            raise Refusal(422, "'images' and 'inputs' must be files, with a filename")
        if len(files) > limits.rows:
            raise Refusal(413, f"more than {limits.rows} images; send fewer rows at once")
        await take(JSON_COST * len(fields[0]))
        body = await run_in_threadpool(parse_request, fields[0], limits)
        images = [await file.read() for file in files if isinstance(file, UploadFile)]
        return body, images, [await file.read() for file in inputs if isinstance(file, UploadFile)]
    finally:
        await form.close()


def _multipart_header(content_type: str) -> Headers:
    """Return the header Content-Type with its boundary alone: other parameters choose how Python decodes the form."""
    kind, parameters = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise Refusal(422, f"Content-Type is {content_type}, expected multipart/form-data with a field 'request'")
    boundary = parameters.get(b"boundary", b"").decode("latin-1")
    if not re.fullmatch(r"[\w'()+,./:=? -]+", boundary, re.ASCII):
        raise Refusal(422, "the Content-Type multipart/form-data has no valid boundary")
    return Headers({"Content-Type": f'multipart/form-data; boundary="{boundary}"'})


def parse_request(text: str, limits: Limits) -> ScoreRequest:
    """Parse the JSON of a request. Refuse it unless it has one entry of each kind for every row."""
    try:
        body = ScoreRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refusal(
            422, ": ".join(filter(None, ("request", ".".join(map(str, first["loc"])), first["msg"])))
        ) from error
    rows = len(body.prompts)
    if rows > limits.rows:
        raise Refusal(413, f"{rows} rows, expected at most {limits.rows}; send fewer at once")
    for name, entries in (("metadata", body.metadata), ("texts", body.texts), ("inputs", body.inputs)):
        if entries is not None and len(entries) != rows:
            raise Refusal(422, f"{len(entries)} {name} for {rows} prompts; send one for each")
    return body


def check_samples(body: ScoreRequest, files: Sequence[bytes], reward: Reward) -> None:
    """Refuse a request unless it has a text, an image or a video for each row, of the kind that the reward scores."""
    pictures = "images" if body.frames is None else "videos"
    kind = pictures if body.texts is None else "texts"
    readable = [each for each in ("images", "videos", "texts") if each in reward.needs]
    mixed = body.texts is not None and (bool(files) or body.frames is not None)
    if (readable and kind not in readable) or mixed:
        found = f"texts and {pictures}" if mixed else kind
        expected = " or ".join(readable) or "either"
        raise Refusal(422, f"found {found}, expected {expected} for reward '{reward.name}'")
    if body.texts is None and len(files) != len(body.prompts):
        raise Refusal(422, f"{len(files)} images for {len(body.prompts)} prompts; send one for each")


async def store_inputs(
    body: ScoreRequest, files: Sequence[bytes], folder: Path, limits: Limits, take: Take
) -> list[dict[str, object]]:
    """Write the input images of a request into a folder, and return the metadata of its rows with their paths.

    Paths in the metadata of rows of images are refused: they would name files of this machine.
    """
    metadata = [{} for _ in body.prompts] if body.metadata is None else body.metadata
    for row, facts in enumerate(metadata if body.texts is None else []):
        for key in (IMAGE, MASK):
            if isinstance(path := facts.get(key), str) and os.path.isabs(path):
                raise Refusal(
                    422, f"`{key}` in the metadata is a path, which means nothing here; send 'inputs'", row=row
                )
    for file in files:  # one at a time, each checked by decoding it
        await decode_files([file], None, limits, take)
    paths = [folder / f"{number}.png" for number in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        await run_in_threadpool(path.write_bytes, file)
    for row, numbers in enumerate(body.inputs or []):
        for key, number in numbers.items():
            if not 0 <= number < len(paths):
                raise Refusal(422, f"number {number} of {len(paths)} files 'inputs'; numbers begin with 0", row=row)
            metadata[row] = {**metadata[row], key: str(paths[number])}
    return metadata


async def decode_files(files: Sequence[bytes], frames: int | None, limits: Limits, take: Take) -> Tensor:
    """Return images [B,3,H,W], or videos [B,F,3,H,W] of `frames` frames, with 8 bits.

    Memory is taken for the pixels in their headers before any is decoded.
    """
    most = limits.megapixels * 10**6
    try:
        pixels = await run_in_threadpool(count_pixels, files)
        if pixels > most:
            raise Refusal(413, f"{pixels} pixels in {len(files)} images, expected at most {most} in a request")
        await take(PIXEL_COST * pixels)
        pictures = await run_in_threadpool(decode_images, files)
        return pictures if frames is None else from_strips(pictures, frames)
    except TooManyPixels as error:
        raise Refusal(413, str(error)) from error
    except BadImage as error:
        raise Refusal(422, str(error), index=error.index) from error


async def wait_for_scores(request: Request, job: Future[Scores]) -> Scores:
    """Wait for scores. If the client disconnects, remove its rows from the queue: it may have sent them again.

    Rows that are being scored cannot be removed. They are waited for, because their memory is in use.
    """
    answer = asyncio.wrap_future(job)
    while not (await asyncio.wait({answer}, timeout=PRESENCE))[0]:
        if await request.is_disconnected() and job.cancel():
            raise Refusal(400, "the client has gone")
    return answer.result()


class DeadlineProtocol(H11Protocol):
    """Connections that are closed unless the head of a request arrives within `seconds` of the last answer."""

    seconds: ClassVar[float] = 20.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_head()

    def _expect_head(self) -> None:
        last = cast("RequestResponseCycle | None", self.cycle)  # None before the first request
        if last is None or last.response_complete:
            self.loop.call_later(self.seconds, self._close_unless_after, last)

    def _close_unless_after(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last and not self.transport.is_closing():
            self.transport.abort()


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve on a socket of `open_socket` until SIGINT or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        build_server(app).run(sockets=[listener])


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that accepts connections. OSError if the address is in use or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def build_server(app: FastAPI) -> uvicorn.Server:
    """Build the server of an application. It finishes requests in progress before it stops."""
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=GRACE, http=DeadlineProtocol, ws="none", access_log=False
    )
    return uvicorn.Server(config)


def get_url(listener: socket.socket) -> str:
    """Return the URL of a socket that accepts connections."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _handle_refusal(_: Request, refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.content, refusal.status, refusal.headers)


async def _handle_over_budget(_: Request, error: OverBudget) -> JSONResponse:
    return JSONResponse({"error": f"the request needs {error}; send fewer rows or smaller images at once"}, 413)


async def _handle_shortage(_: Request, error: Busy | Shortage | MemoryError) -> JSONResponse:
    problem = "there is not enough memory now" if isinstance(error, MemoryError) else str(error)
    return JSONResponse({"error": problem}, 503, {"Retry-After": "1"})


async def _handle_unknown_address(request: Request, error: HTTPException) -> JSONResponse:
    problem = f"{error.detail}: {request.method} {request.url.path}; {ADDRESSES}"
    return JSONResponse({"error": problem}, error.status_code, error.headers)


async def _stream_body(request: Request, max_bytes: int, take: Take) -> AsyncGenerator[bytes, None]:
    """Yield the body of a request, and refuse it above the limit, whatever its Content-Length."""
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > max_bytes:
            raise Refusal(413, f"more than {max_bytes} bytes; send fewer rows at once")
        await take(BODY_COST * len(chunk))
        yield chunk


def _describe_names(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}It has: {', '.join(known)}"
