"""A reward of a server (`difrl serve`), here or on another machine.

Images travel as PNG, which is lossless for 8 bits: the server scores what would be saved, rounded to 8 bits. With
format: jpeg they are a few times smaller and not the same pictures.
"""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from rewards.base import Metadata, RewardError, Samples, Scores, check_images, check_texts
from rewards.encoding import checked_format, encoded
from rewards.http import RETRIES, TIMEOUT, Connection, HttpError, concurrently, secret
from rewards.protocol import PROTOCOL


class Remote:
    """A reward of a server that `difrl serve` started, by its URL and the reward's name there.

    token_env: the environment variable that holds the server's token. in_flight: batches on their way at a time. timeout:
    seconds for an answer; retries: of requests that find the server unreachable or overloaded. An answer with another number
    of values than rows, or with one that is no finite number, is an error; null is a row that the reward could not score.
    """

    name = "remote"
    needs: tuple[str, ...] = ("prompts", "metadata")  # and images or texts, as the server's reward does

    def __init__(
        self,
        *,
        url: str,
        reward: str,
        token_env: str | None = None,
        batch_size: int = 16,
        in_flight: int = 4,
        format: str = "png",
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
    ) -> None:
        if batch_size < 1 or in_flight < 1:
            raise ValueError(
                f"reward 'remote': batch_size is {batch_size} and in_flight {in_flight}, expected 1 or more"
            )
        self.reward, self.batch_size, self.in_flight = reward, batch_size, in_flight
        self.format = checked_format(format, self.name)
        token = secret(token_env, self.name, "token_env")
        self.connection = Connection(self.name, url, token=token, timeout=timeout, retries=retries)
        self._agreed, self._asking = False, threading.Lock()

    def to(self, device: torch.device | str) -> Remote:
        """Nothing to move: the server chooses where its rewards run."""
        return self

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1], or B texts."""
        self.agree()
        samples = check_images(samples, self.name) if isinstance(samples, Tensor) else check_texts(samples, self.name)
        starts = range(0, len(prompts), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        answers = concurrently(
            lambda rows: self._scored(samples[rows], prompts[rows], metadata[rows], rows.start), parts, self.in_flight
        )
        listed = [value for answer in answers for value in answer]
        values = torch.tensor([0.0 if value is None else value for value in listed], dtype=torch.float32)
        valid = torch.tensor([value is not None for value in listed], dtype=torch.bool)
        device = samples.device if isinstance(samples, Tensor) else torch.device("cpu")
        return Scores(values.to(device), valid.to(device))

    def agree(self) -> None:
        """Ask once whether the server speaks this protocol and has the reward."""
        with self._asking:
            if self._agreed:
                return
            url, said = self.connection.url, self.connection.get("/version")
            protocol = said.get("protocol") if isinstance(said, dict) else None
            if protocol != PROTOCOL:
                problem = f"{url} speaks protocol {protocol}, expected {PROTOCOL}; use the same version of difrl on both sides"
                raise RewardError(self.name, problem)
            if self.reward not in said["rewards"]:
                near = difflib.get_close_matches(self.reward, said["rewards"], 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                known = ", ".join(said["rewards"])
                raise RewardError(self.name, f"{url} has no reward '{self.reward}'{hint} It has: {known}")
            self._agreed = True

    def _scored(
        self, samples: Samples, prompts: Sequence[str], metadata: Metadata, first: int
    ) -> Sequence[float | None]:
        """Values of a batch that begins at row `first`."""
        ask: dict[str, Any] = {"prompts": list(prompts), "metadata": [dict(row) for row in metadata]}
        files = []
        if isinstance(samples, Tensor):
            kind = f"image/{self.format}"
            pictures = encoded(samples, self.format)
            files = [("images", (f"{i}.{self.format}", picture, kind)) for i, picture in enumerate(pictures)]
        else:
            ask["texts"] = list(samples)
        try:
            field = (None, json.dumps(ask, allow_nan=False).encode(), "application/json")
        except (TypeError, ValueError) as error:
            raise RewardError(self.name, f"metadata must be what JSON can hold, to be sent: {error}") from error
        path = f"/score/{quote(self.reward, safe='')}"
        try:
            said = self.connection.post(path, files=[("request", field), *files])
        except HttpError as error:
            raise _with_row(error, prompts, first) from error
        return checked_values(said, len(prompts), self.connection.url + path)


def checked_values(said: Any, count: int, address: str) -> Sequence[float | None]:
    """The values of an answer, if there is one for each row: a finite number, or None."""
    values = said.get("values") if isinstance(said, dict) else None
    if not isinstance(values, list):
        raise RewardError("remote", f'{address} answered without a list of "values": {str(said)[:200]}')
    if len(values) != count:
        raise RewardError("remote", f"{address} answered {len(values)} values for {count} rows")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
            raise RewardError("remote", f"{address} answered the value {value!r}, expected a finite number or null")
    return values


def _finite(value: float) -> bool:
    return abs(value) <= torch.finfo(torch.float32).max


def _with_row(error: HttpError, prompts: Sequence[str], first: int) -> RewardError:
    """The error, with the row that the server blames, if any, counted in the whole call."""
    row = error.detail.get("row", error.detail.get("index"))
    if not isinstance(row, int) or not 0 <= row < len(prompts):
        return error
    return RewardError(error.name, error.problem, first + row, prompts[row])
