"""Requests over HTTP, repeated while the other side is unreachable, overloaded or starting. For rewards that live elsewhere."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from ipaddress import ip_address
from typing import Any, TypeVar

import httpx

from rewards.base import RewardError
from rewards.protocol import is_token

REPEATED = frozenset({429, 502, 503, 504})
"""Statuses that time may cure: too many requests, and a gateway or a server that is overloaded or starts."""
TIMEOUT, RETRIES = 60.0, 4  # where nothing else is asked for
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds
_PASSING = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
_UNIFORM = random.Random().uniform
_SHOWN = 500  # characters of an answer in an error

A = TypeVar("A")
B = TypeVar("B")


class HttpError(RewardError):
    """A request got no answer, or not one of success. `detail` is the answer's JSON object, where it had one."""

    def __init__(
        self, name: str, problem: str, status: int | None = None, detail: dict[str, Any] | None = None
    ) -> None:
        super().__init__(name, problem)
        self.problem, self.status, self.detail = problem, status, detail or {}


class Connection:
    """JSON from the addresses below one URL.

    A request is repeated, `retries` times at most, where no answer comes within `timeout` seconds, where the connection
    fails, and after a status of `REPEATED`; no other status is. Before the k-th repetition it waits

        w ~ uniform(p/2, p),   p = min(0.5 · 2ᵏ⁻¹, 60) seconds

    or as long as the answer's Retry-After says, up to 60 seconds. The randomness keeps clients that failed together from
    coming back together; it is none of the global generator's, from which rewards may draw.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        token: str | None = None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
        uniform: Callable[[float, float], float] = _UNIFORM,
    ) -> None:
        if timeout <= 0 or retries < 0:
            raise ValueError(
                f"reward '{name}': timeout is {timeout} and retries {retries}; expected above 0, and 0 or more"
            )
        self.name, self.url, self.retries = name, checked_url(url, name), retries
        self._sleep, self._uniform = sleep, uniform
        self._client = httpx.Client(
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            trust_env=not is_loopback(httpx.URL(url).host),  # a proxy cannot reach this machine's own addresses
            transport=transport,
        )

    def get(self, path: str) -> Any:
        """The JSON at an address."""
        return self._request("GET", path)

    def post(self, path: str, **content: Any) -> Any:
        """The JSON that answers `content`: keyword arguments of httpx, such as json= and files=."""
        return self._request("POST", path, **content)

    def close(self) -> None:
        """Let go of the open connections."""
        self._client.close()

    def _request(self, method: str, path: str, **content: Any) -> Any:
        address = self.url + path
        for attempt in range(self.retries + 1):
            try:
                response = self._client.request(method, address, **content)
            except _PASSING as error:
                if attempt == self.retries:
                    problem = f"{address}: {_said(error)} ({_attempts(attempt)})"
                    raise HttpError(self.name, problem) from error
                self._sleep(self._pause(attempt))
                continue
            if response.status_code not in REPEATED or attempt == self.retries:
                return self._content(response, address, attempt)
            self._sleep(max(self._pause(attempt), _retry_after(response)))
        raise AssertionError("the last attempt returns or raises")

    def _pause(self, attempt: int) -> float:
        longest = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        return self._uniform(longest / 2, longest)

    def _content(self, response: httpx.Response, address: str, attempt: int) -> Any:
        try:
            content = response.json()
        except ValueError:  # no JSON, or no text at all
            content = None
        if not response.is_success:
            problem = f"{address} answered {response.status_code} ({_attempts(attempt)}): {_message(content, response)}"
            raise HttpError(self.name, problem, response.status_code, content if isinstance(content, dict) else None)
        if content is None:
            raise HttpError(self.name, f"{address} answered what is no JSON: {response.text[:_SHOWN]!r}")
        return content


def concurrently(function: Callable[[A], B], items: Sequence[A], at_once: int) -> list[B]:
    """What a function makes of each item, in their order, by a few threads; after an error no further item is begun."""
    with ThreadPoolExecutor(max(1, min(at_once, len(items)))) as pool:
        pending = [pool.submit(function, item) for item in items]
        finished, _ = wait(pending, return_when=FIRST_EXCEPTION)
        for failed in (one for one in finished if one.exception() is not None):
            pool.shutdown(wait=False, cancel_futures=True)
            failed.result()
        return [one.result() for one in pending]


def secret(variable: str | None, name: str, option: str) -> str | None:
    """What an environment variable holds: secrets do not belong into a recipe."""
    if variable is None:
        return None
    found = os.environ.get(variable)
    if not found:
        raise ValueError(f"reward '{name}': {option} names the environment variable {variable}, which is not set")
    if not is_token(found):
        raise ValueError(f"reward '{name}': {variable} holds spaces or other characters that no header can carry")
    return found


def checked_url(url: str, name: str) -> str:
    """A URL without its last slash, if requests can be sent below it."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"reward '{name}': {url!r} is no URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ValueError(f"reward '{name}': expected a URL such as http://127.0.0.1:8000, found {url!r}")
    if parsed.userinfo:
        raise ValueError(f"reward '{name}': the URL holds a password; give the name of an environment variable instead")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine can reach."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _said(error: Exception) -> str:
    kind = "no answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
    return f"{kind}: {type(error).__name__}" + (f": {error}" if str(error) else "")


def _attempts(attempt: int) -> str:
    return "1 attempt" if attempt == 0 else f"{attempt + 1} attempts"


def _retry_after(response: httpx.Response) -> float:
    """Seconds of the header Retry-After, which may hold a date too; 0 without."""
    try:
        return min(max(float(response.headers.get("Retry-After", "0")), 0.0), LONGEST_PAUSE)
    except ValueError:
        return 0.0


def _message(content: Any, response: httpx.Response) -> str:
    """What the answer says is wrong, in the form of this package's server, of OpenAI's and of FastAPI's."""
    if isinstance(content, dict):
        found = content.get("error", content.get("detail", content.get("message")))
        found = found.get("message", found) if isinstance(found, dict) else found
        if found:
            return str(found)[:_SHOWN]
    return response.text[:_SHOWN] or response.reason_phrase
