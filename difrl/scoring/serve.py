"""`difrl serve`: parse its arguments, build the rewards, and print the address once the server has started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from pydantic import Field
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from difrl.config import RewardConfig
from difrl.config.load import read_model
from difrl.config.schema.base import Section
from difrl.config.yaml_source import ConfigError, parse_overrides
from difrl.runtime.suggestions import did_you_mean
from difrl.scoring.parse_reward import parse_reward
from difrl.scoring.standalone import build_standalone, check_standalone
from rewards import Reward
from rewards.http import is_loopback
from rewards.protocol import is_token
from rewards.server import Limits, create_app, get_url, open_socket, run


class ServedConfig(Section):
    """The configuration file of `difrl serve`."""

    rewards: list[RewardConfig] = Field(
        min_length=1, description="as in a recipe, e.g. [{name: geneval}], without shape and weight"
    )


def parse_served(arguments: Sequence[str]) -> list[RewardConfig]:
    """Return the rewards of arguments: names, YAML files, and options as REWARD.option=value."""
    settings = [argument for argument in arguments if "=" in argument and not argument.lstrip().startswith("{")]
    sources = [argument for argument in arguments if argument not in settings]
    options = parse_overrides(settings).data
    configs = [config for source in sources for config in _read_rewards(source)]
    check_standalone(configs)
    labels = [config.label for config in configs]
    for label, own in options.items():
        if label not in labels or not isinstance(own, Mapping):
            raise ConfigError(
                f"option '{label}': expected REWARD.option=value with a served reward; "
                f"{did_you_mean(label, labels)}Served: {', '.join(labels)}"
            )
    return [_set_options(config, options.get(config.label, {})) for config in configs]


def serve(
    configs: Sequence[RewardConfig],
    *,
    host: str,
    port: int,
    token: str | None,
    max_batch: int,
    wait: float,
    limits: Limits,
    device: torch.device | str,
    console: Console,
) -> None:
    """Serve rewards until SIGINT or SIGTERM."""
    if token is not None and not is_token(token):
        raise ConfigError("--token: expected one or more visible ASCII characters without spaces; found another")
    rewards = {config.label: build_standalone(config, device) for config in configs}
    try:
        listener = open_socket(host, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose others") from error
    app = create_app(rewards, version=version("difrl"), token=token, max_batch=max_batch, wait=wait, limits=limits)
    with listener:
        console.print(build_start_message(get_url(listener), rewards, token is not None, max_batch, limits))
        run(app, listener)


def build_start_message(
    url: str, rewards: Mapping[str, Reward], has_token: bool, max_batch: int, limits: Limits
) -> Group:
    """Build the message with the server's address, rewards, token and limits."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("address", f"[bold]{escape(url)}[/]")
    for index, (name, reward) in enumerate(rewards.items()):
        needs = f"  [dim]{escape(', '.join(reward.needs))}[/]"
        table.add_row("" if index else "rewards", f"[bold]{escape(name)}[/]{needs}")
    table.add_row("token", "on" if has_token else "off")
    table.add_row("a batch", f"up to {max_batch} rows, of one request or of several")
    table.add_row(
        "a request", f"up to {limits.rows} rows, {limits.megabytes} MB, {limits.megapixels} megapixels decoded"
    )
    table.add_row("all requests", f"up to {limits.memory} MB of memory; more wait, and are then refused")
    table.add_row("stop with", "Ctrl-C; requests in progress are answered first")
    host = url.removeprefix("http://").rpartition(":")[0].strip("[]")
    return Group(table, *([] if has_token or is_loopback(host) else [_WARNING]))


_WARNING = (
    "[bold yellow]warning:[/] no token, and others can reach this address: set --token, or\n"
    "the environment variable DIFRL_TOKEN, or listen on --host 127.0.0.1"
)


def _read_rewards(source: str) -> list[RewardConfig]:
    if source.endswith((".yaml", ".yml")):
        return read_model(ServedConfig, source).rewards
    return [parse_reward(source)]


def _set_options(config: RewardConfig, options: Mapping[str, object]) -> RewardConfig:
    if options and config.ensemble is not None:
        raise ConfigError(
            f"option '{config.label}.{next(iter(options))}': an ensemble has none; set it for its members"
        )
    return config.model_copy(update={"options": {**config.options, **options}})
