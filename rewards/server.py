"""Rewards as a service: what has its own environment or its own GPU is scored where it lives.

    POST /score/REWARD   multipart/form-data: a field `request` with JSON {"prompts": […], "metadata": […]}, and a file
                         `images` (PNG or JPEG) for each prompt, or "texts": […] in the JSON instead
                         → {"values": [0.5, null, …]}, null for a row that could not be scored
    GET  /health         whether requests are taken, and what each reward is doing; needs no token
    GET  /version        versions of the program and of this protocol, the rewards, the limits of a request

What is wrong with a request is said in {"error": …}: 401 without the token, 404 for an unknown reward or address, 405 for
another method, 413 for one that is too large, 422 for one that cannot be understood, with the `index` of a bad image; 500
with the `row` where the reward failed; 503 where too much waits already. Nothing is ever unpickled: images are files of two
formats, the rest is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hmac
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from rewards.base import Reward, RewardError, Samples, Scores
from rewards.batching import Batcher, Busy
from rewards.encoding import BadImage, TooManyPixels, decoded
from rewards.protocol import PROTOCOL, is_token

log = logging.getLogger(__name__)
ADDRESSES = "expected POST /score/REWARD, GET /health or GET /version"
WAITING = 4
"""Requests of the largest size that may wait for one reward."""
GRACE = 30
"""Seconds that requests in progress have to end when the server is stopped."""


@dataclass(frozen=True)
class Limits:
    """How large a request may be, and how much may wait."""

    rows: int = 256
    megabytes: int = 64  # of the body
    megapixels: int = 64  # of all its images, decoded; three bytes each, then twelve
    waiting: int = 1024  # rows of all requests for one reward

    @property
    def size(self) -> int:
        """Bytes of the largest request's images, decoded to three a pixel, or texts; no call holds more of several."""
        return max(3 * self.megapixels, self.megabytes) * 10**6


class Ask(BaseModel):
    """The JSON of a request: a prompt for each row; without metadata every row has none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: list[str]
    metadata: list[dict[str, Any]] | None = None
    texts: list[str] | None = None


class Refusal(Exception):
    """A request that is not answered with scores."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None, **detail: Any) -> None:
        super().__init__(error)
        self.status, self.headers, self.content = status, headers, {"error": error, **detail}


def create_app(
    rewards: Mapping[str, Reward],
    *,
    version: str,
    token: str | None = None,
    max_batch: int = 64,
    wait: float = 0.005,
    limits: Limits | None = None,
) -> FastAPI:
    """The service of these rewards; `max_batch` and `wait` (seconds) as in `Batcher`."""
    if token is not None and not is_token(token):
        raise ValueError("a token is one or more visible ASCII characters, without spaces; found another")
    limits = limits or Limits()
    batchers = {
        name: Batcher(
            reward,
            max_batch=max_batch,
            max_size=limits.size,
            wait=wait,
            most_waiting=limits.waiting,
            most_size=WAITING * limits.size,
        )
        for name, reward in rewards.items()
    }

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
        exception_handlers={Refusal: _refused, HTTPException: _nowhere},
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
    async def about(request: Request) -> dict[str, Any]:
        check_token(request, token)
        needs = {name: {"needs": list(reward.needs)} for name, reward in rewards.items()}
        return {"version": version, "protocol": PROTOCOL, "rewards": needs, "limits": asdict(limits)}

    @app.post("/score/{name}")
    async def score(name: str, request: Request) -> dict[str, list[float | None]]:
        check_token(request, token)
        if name not in batchers:
            raise Refusal(404, f"no reward '{name}' here; {_nearest(name, batchers)}")
        ask, files = await read(request, limits)
        samples = await run_in_threadpool(samples_of, ask, files, rewards[name], limits)
        if not ask.prompts:
            return {"values": []}
        metadata = [{} for _ in ask.prompts] if ask.metadata is None else ask.metadata
        try:
            job = batchers[name].submit(samples, ask.prompts, metadata)
        except Busy as error:
            raise Refusal(503, str(error), {"Retry-After": "1"}) from error
        try:
            scores: Scores = await unless_left(request, asyncio.wrap_future(job))
        except RewardError as error:
            raise Refusal(500, str(error), reward=name, row=error.row) from error
        rows = zip(scores.values.tolist(), scores.valid.tolist(), strict=True)
        return {"values": [value if valid else None for value, valid in rows]}

    return app


def check_token(request: Request, token: str | None) -> None:
    """Refuse a request without the token, in a time that does not depend on how much of it was guessed."""
    if token is None:
        return
    scheme, _, found = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(found.strip().encode(), token.encode()):
        problem = "this server wants its token: Authorization: Bearer …"
        raise Refusal(401, problem, {"WWW-Authenticate": "Bearer"})


async def read(request: Request, limits: Limits) -> tuple[Ask, list[bytes]]:
    """The JSON and the images of a request, of which no more than the limit is read."""
    most = limits.megabytes * 10**6
    said = request.headers.get("Content-Length", "0")
    if said.isdecimal() and int(said) > most:
        raise Refusal(413, f"{int(said)} bytes, expected at most {most}; send fewer rows at once")
    if not request.headers.get("Content-Type", "").startswith("multipart/form-data"):
        found = request.headers.get("Content-Type", "none")
        raise Refusal(422, f"Content-Type is {found}, expected multipart/form-data with a field 'request'")
    parser = MultiPartParser(
        request.headers, _counted(request, most), max_files=limits.rows, max_fields=1, max_part_size=most
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise Refusal(413, f"more than {limits.rows} images; send fewer rows at once") from error
        raise Refusal(422, error.message) from error
    except ClientDisconnect as error:
        raise Refusal(400, "the request ended before its end") from error
    try:
        fields, files = form.getlist("request"), form.getlist("images")
        if len(fields) + len(files) < len(form.multi_items()) or len(fields) != 1 or not isinstance(fields[0], str):
            parts = ", ".join(sorted({name for name, _ in form.multi_items()})) or "none"
            raise Refusal(422, f"expected one field 'request' with JSON, and files 'images'; found the parts: {parts}")
        if not all(isinstance(file, UploadFile) for file in files):
            raise Refusal(422, "'images' must be files, with a filename")
        return parsed(fields[0], limits), [await file.read() for file in files if isinstance(file, UploadFile)]
    finally:
        await form.close()


def parsed(text: str, limits: Limits) -> Ask:
    """The JSON of a request, if it has one entry of each kind for every row."""
    try:
        ask = Ask.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refusal(
            422, ": ".join(filter(None, ("request", ".".join(map(str, first["loc"])), first["msg"])))
        ) from error
    rows = len(ask.prompts)
    if rows > limits.rows:
        raise Refusal(413, f"{rows} rows, expected at most {limits.rows}; send fewer at once")
    for name, entries in (("metadata", ask.metadata), ("texts", ask.texts)):
        if entries is not None and len(entries) != rows:
            raise Refusal(422, f"{len(entries)} {name} for {rows} prompts; send one for each")
    return ask


def samples_of(ask: Ask, files: Sequence[bytes], reward: Reward, limits: Limits) -> Samples:
    """The texts of a request or its images, of 8 bits, if they are what the reward scores."""
    kind, other = ("images", "texts") if ask.texts is None else ("texts", "images")
    if (other in reward.needs and kind not in reward.needs) or (ask.texts is not None and files):
        found = "texts and images" if ask.texts is not None and files else kind
        wanted = " or ".join(one for one in ("images", "texts") if one in reward.needs) or "either"
        raise Refusal(422, f"found {found}, expected {wanted} for reward '{reward.name}'")
    if ask.texts is not None:
        return ask.texts
    if len(files) != len(ask.prompts):
        raise Refusal(422, f"{len(files)} images for {len(ask.prompts)} prompts; send one for each")
    if not files:
        return []
    try:
        return decoded(files, limits.megapixels * 10**6)
    except TooManyPixels as error:
        raise Refusal(413, str(error)) from error
    except BadImage as error:
        raise Refusal(422, str(error), index=error.index) from error


async def unless_left(request: Request, answer: asyncio.Future[Scores]) -> Scores:
    """The answer; where the client has gone meanwhile, its rows leave the queue: it may have sent them anew."""
    while not (await asyncio.wait({answer}, timeout=1.0))[0]:
        if await request.is_disconnected():
            answer.cancel()
            raise Refusal(400, "the client has gone")
    return answer.result()


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve on a socket of `listening` until SIGINT or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        server(app).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that accepts connections already; OSError where the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def server(app: FastAPI) -> uvicorn.Server:
    """The server of an application, which ends requests in progress before it stops."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE))


def url_of(listener: socket.socket) -> str:
    """Where a socket listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _refused(_: Request, refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.content, refusal.status, refusal.headers)


async def _nowhere(request: Request, error: HTTPException) -> JSONResponse:
    """Of an address or a method that there is not."""
    problem = f"{error.detail}: {request.method} {request.url.path}; {ADDRESSES}"
    return JSONResponse({"error": problem}, error.status_code, error.headers)


async def _counted(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body of a request, whatever length it was said to have."""
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > most:
            raise Refusal(413, f"more than {most} bytes; send fewer rows at once")
        yield chunk


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}It has: {', '.join(known)}"
