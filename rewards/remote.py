"""A reward of a server (`difrl serve`), on this machine or another.

Images are sent as PNG, which is lossless for 8 bits: the server scores the images that would be saved. With format: jpeg
the files are a few times smaller, but lossy. A video is a single picture of its frames, one below the other. Input images of
edits, which the metadata name, are sent too, always as PNG.
"""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Sequence
from urllib.parse import quote

import torch
from torch import Tensor

from rewards.base import Metadata, RewardError, Samples, Scores, WithoutDevice, check_images, check_texts, check_videos
from rewards.encoding import FORMATS, encode_images, to_strips
from rewards.http import RETRIES, TIMEOUT, Connection, HttpError, map_concurrently, read_secret
from rewards.input_images import pack_inputs
from rewards.options import check_at_least_one, check_choice
from rewards.protocol import PROTOCOL, printable


class Remote(WithoutDevice):
    """A reward of a server that `difrl serve` started, by its URL and the reward's name there.

    token_env: the environment variable with the server's token. in_flight: number of batches sent at the same time. timeout:
    seconds for a response. retries: repetitions of requests while the server is unreachable or overloaded. A response with
    another number of values than rows, or with a value that is not finite, is an error. null marks a row that the reward
    could not score.
    """

    name = "remote"
    needs: tuple[str, ...] = ("prompts", "metadata")  # and images, videos or texts, as the server's reward needs

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
        check_at_least_one(self.name, batch_size=batch_size, in_flight=in_flight)
        self.reward, self.batch_size, self.in_flight = reward, batch_size, in_flight
        self.format = check_choice(self.name, "format", format, FORMATS)
        token = read_secret(token_env, self.name, "token_env")
        self.connection = Connection(self.name, url, token=token, timeout=timeout, retries=retries)
        self._handshake_done, self._handshake = False, threading.Lock()

    def __call__(self, samples: Samples, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] or videos [B,F,3,H,W] in [0,1], or B texts."""
        self.check_server()
        if not isinstance(samples, Tensor):
            samples = check_texts(samples, self.name)
        else:
            samples = (check_videos if samples.ndim == 5 else check_images)(samples, self.name)
        starts = range(0, len(prompts), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        results = map_concurrently(
            lambda rows: self._score(samples[rows], prompts[rows], metadata[rows], rows.start), parts, self.in_flight
        )
        scores = Scores.from_list([value for values in results for value in values])
        return scores.to(samples.device if isinstance(samples, Tensor) else "cpu")

    def check_server(self) -> None:
        """Check once that the server has this protocol and the reward. Raise RewardError otherwise."""
        with self._handshake:
            if self._handshake_done:
                return
            url, response = self.connection.url, self.connection.get("/version")
            protocol = response.get("protocol") if isinstance(response, dict) else None
            if protocol != PROTOCOL:
                found = printable(str(protocol))
                problem = (
                    f"{url} has protocol {found}, expected {PROTOCOL}; use the same version of difrl on both sides"
                )
                raise RewardError(self.name, problem)
            rewards = response.get("rewards")
            if not isinstance(rewards, dict) or self.reward not in rewards:
                names = list(map(printable, rewards)) if isinstance(rewards, dict) else []
                near = difflib.get_close_matches(self.reward, names, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                known = printable(", ".join(names))
                raise RewardError(self.name, f"{url} has no reward '{self.reward}'{hint} It has: {known}")
            self._handshake_done = True

    def _score(
        self, samples: Samples, prompts: Sequence[str], metadata: Metadata, first: int
    ) -> Sequence[float | None]:
        """Return the values of a batch that begins at row `first`."""
        request: dict[str, object] = {"prompts": list(prompts), "metadata": [dict(row) for row in metadata]}
        files = []
        if isinstance(samples, Tensor):
            request["metadata"], numbers, inputs = pack_inputs(metadata)
            if inputs:
                request["inputs"] = numbers
                files += [("inputs", (f"{i}.png", file, "image/png")) for i, file in enumerate(inputs)]
            kind = f"image/{self.format}"
            if samples.ndim == 5:
                request["frames"], samples = samples.shape[1], to_strips(samples)
            pictures = encode_images(samples, self.format)
            files += [("images", (f"{i}.{self.format}", picture, kind)) for i, picture in enumerate(pictures)]
        else:
            request["texts"] = list(samples)
        try:
            field = (None, json.dumps(request, allow_nan=False).encode(), "application/json")
        except (TypeError, ValueError) as error:
            raise RewardError(self.name, f"metadata cannot be sent as JSON: {error}") from error
        path = f"/score/{quote(self.reward, safe='')}"
        try:
            response = self.connection.post(path, files=[("request", field), *files])
        except HttpError as error:
            raise _add_row(error, prompts, first) from error
        return check_values(response, len(prompts), self.connection.url + path)


def check_values(response: object, count: int, address: str) -> Sequence[float | None]:
    """Return the values of a response. Raise RewardError unless there is a finite number or None for each row."""
    values = response.get("values") if isinstance(response, dict) else None
    if not isinstance(values, list):
        raise RewardError("remote", f'{address} answered without a list of "values": {printable(str(response))}')
    if len(values) != count:
        raise RewardError("remote", f"{address} answered {len(values)} values for {count} rows")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value)):
            raise RewardError(
                "remote", f"{address} answered the value {printable(repr(value))}, expected a finite number or null"
            )
    return values


def _finite(value: float) -> bool:
    return abs(value) <= torch.finfo(torch.float32).max


def _add_row(error: HttpError, prompts: Sequence[str], first: int) -> RewardError:
    """Return the error with the row in the server's response, if any, as its row in the whole call."""
    row = error.detail.get("row", error.detail.get("index"))
    if not isinstance(row, int) or not 0 <= row < len(prompts):
        return error
    return RewardError(error.name, error.problem, first + row, prompts[row])
