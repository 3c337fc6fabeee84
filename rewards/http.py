"""HTTP requests of rewards that run elsewhere, repeated while the server is unreachable, overloaded or starting."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cache
from ipaddress import ip_address
from typing import Any, NamedTuple, TypeVar

import httpx

from rewards.base import RewardError
from rewards.protocol import is_token, printable

REPEATED = frozenset({429, 502, 503, 504})
"""Statuses after which a later request may succeed: too many requests, and an overloaded or starting gateway or server."""
TIMEOUT, RETRIES = 60.0, 4  # defaults
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
_TEMPORARY = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, TimeoutError)
_UNIFORM = random.Random().uniform
MOST_BYTES = 4_000_000
"""Bytes of a response: values of a thousand rows are a hundredth of it."""

A = TypeVar("A")
B = TypeVar("B")


class HttpError(RewardError):
    """A request without a response, or with a status that is not a success. `detail` is the JSON object of the response."""

    def __init__(
        self, name: str, problem: str, status: int | None = None, detail: dict[str, object] | None = None
    ) -> None:
        super().__init__(name, problem)
        self.problem, self.status, self.detail = problem, status, detail or {}


class _Response(NamedTuple):
    status: int
    reason: str
    retry_after: float
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")


class Connection:
    """A client for JSON from the addresses below one URL.

    A request is repeated, at most `retries` times, if there is no whole response within `timeout` seconds, if the connection
    fails, and after a status of `REPEATED`. Before the k-th repetition it waits

        w ~ uniform(p/2, p),   p = min(0.5 · 2ᵏ⁻¹, 60) seconds

    or the time of the response's Retry-After header, up to 60 seconds. Random pauses keep clients that failed together from
    returning together. They do not use the global random generator, from which rewards may draw.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        token: str | None = None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
        uniform: Callable[[float, float], float] = _UNIFORM,
    ) -> None:
        if timeout <= 0 or retries < 0:
            raise ValueError(
                f"reward '{name}': timeout is {timeout} and retries {retries}; expected above 0, and 0 or more"
            )
        self.name, self.url, self.retries = name, check_url(url, name), retries
        self._sleep, self._uniform = sleep, uniform
        self.timeout = timeout
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"} | ({} if token is None else {"Authorization": f"Bearer {token}"}),
            timeout=httpx.Timeout(None, connect=min(timeout, 10.0)),  # `_send` limits the whole
            limits=httpx.Limits(),  # a wait for a free connection would count as the server's
            trust_env=not is_loopback(httpx.URL(url).host),  # a proxy cannot reach this machine's own addresses
            transport=transport,
        )

    def get(self, path: str) -> Any:
        """Return the JSON at an address."""
        return self._request("GET", path)

    def post(self, path: str, **content: Any) -> Any:
        """Send `content` (keyword arguments of httpx, such as json= and files=) and return the JSON of the response."""
        return self._request("POST", path, **content)

    def close(self) -> None:
        """Close the open connections."""
        _run(self._client.aclose())

    def _request(self, method: str, path: str, **content: Any) -> Any:
        address = self.url + path
        for attempt in range(self.retries + 1):
            is_last = attempt == self.retries
            try:
                response = _run(self._send(method, address, content))
            except _TEMPORARY as error:
                if is_last:
                    problem = f"{address}: {_describe_error(error)} ({_attempts(attempt)})"
                    raise HttpError(self.name, problem) from error
                self._sleep(self._pause(attempt))
            else:
                if is_last or response.status not in REPEATED:
                    return self._parse(response, address, attempt)
                self._sleep(max(self._pause(attempt), response.retry_after))
        raise AssertionError("the last attempt returns or raises")

    async def _send(self, method: str, address: str, content: dict[str, Any]) -> _Response:
        """Send a request, and read the response within the time and the size that it may have."""
        async with asyncio.timeout(self.timeout), self._client.stream(method, address, **content) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise HttpError(self.name, f"{address} answered compressed, which was not asked for")
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise HttpError(self.name, f"{address} answered more than {MOST_BYTES} bytes")
        return _Response(response.status_code, response.reason_phrase, _retry_after(response), bytes(body))

    def _pause(self, attempt: int) -> float:
        longest = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        return self._uniform(longest / 2, longest)

    def _parse(self, response: _Response, address: str, attempt: int) -> Any:
        try:
            content = json.loads(response.body)
        except (ValueError, RecursionError):  # neither JSON nor text, or JSON of thousands of levels
            content = None
        if not 200 <= response.status < 300:
            problem = f"{address} answered {response.status} ({_attempts(attempt)}): {_message(content, response)}"
            raise HttpError(self.name, problem, response.status, content if isinstance(content, dict) else None)
        if content is None:
            raise HttpError(self.name, f"{address} answered something that is not JSON: '{printable(response.text)}'")
        return content


def _run(work: Coroutine[Any, Any, A]) -> A:
    """Return the result of work on the event loop of all requests: only there can a deadline end a response that trickles."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _loop() -> asyncio.AbstractEventLoop:
    with _STARTING:  # first requests of several threads must not start a loop each
        return _start_loop()


_STARTING = threading.Lock()


@cache
def _start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward requests", daemon=True).start()
    return loop


def map_concurrently(function: Callable[[A], B], items: Sequence[A], threads: int) -> list[B]:
    """Return `function(item)` for each item, in order, computed by a few threads. After an error no further item starts."""
    with ThreadPoolExecutor(max(1, min(threads, len(items)))) as pool:
        futures = [pool.submit(function, item) for item in items]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for failed in (future for future in finished if future.exception() is not None):
            pool.shutdown(wait=False, cancel_futures=True)
            failed.result()
        return [future.result() for future in futures]


def read_secret(variable: str | None, name: str, option: str) -> str | None:
    """Return the value of an environment variable: recipes must not contain secrets. None without a variable."""
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"reward '{name}': {option} names the environment variable {variable}, which is not set")
    if not is_token(value):
        raise ValueError(
            f"reward '{name}': {variable} contains spaces or other characters that an HTTP header cannot contain"
        )
    return value


def check_url(url: str, name: str) -> str:
    """Return a URL without its last slash. Raise ValueError unless requests can be sent below it."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"reward '{name}': {url!r} is no URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ValueError(f"reward '{name}': expected a URL such as http://127.0.0.1:8000, found {url!r}")
    if parsed.userinfo:
        raise ValueError(
            f"reward '{name}': the URL contains a password; give the name of an environment variable instead"
        )
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _describe_error(error: Exception) -> str:
    kind = "no answer in time" if isinstance(error, httpx.TimeoutException | TimeoutError) else "cannot be reached"
    return f"{kind}: {type(error).__name__}" + (f": {printable(str(error))}" if str(error) else "")


def _attempts(attempt: int) -> str:
    return "1 attempt" if attempt == 0 else f"{attempt + 1} attempts"


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds of the header Retry-After; 0 if it is missing or a date."""
    try:
        return min(max(float(response.headers.get("Retry-After", "0")), 0.0), LONGEST_PAUSE)
    except ValueError:
        return 0.0


def _message(content: object, response: _Response) -> str:
    """Return the error message of a response in the format of this package's server, OpenAI or FastAPI."""
    if isinstance(content, dict):
        found = content.get("error", content.get("detail", content.get("message")))
        found = found.get("message", found) if isinstance(found, dict) else found
        if found:
            return printable(str(found))
    return printable(response.text or response.reason)
