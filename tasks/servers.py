"""Servers that serve the policy: which of them a shard is drawn from, and with how many requests at once."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tasks.leases import leased
from tasks.settings import GenerateConfig
from tasks.settings_execution import ExecutionConfig

if TYPE_CHECKING:
    from runtime.decoding.server import Server


@contextmanager
def a_server(config: GenerateConfig, execution: ExecutionConfig) -> Iterator[GenerateConfig]:
    """The configuration with the one server that this shard is drawn from, and its share of the requests.

    Each server has places for as many workers as must share it; the workers of one machine hold a place each, so all
    of them together never have more than `server_concurrency` requests at one server.
    """
    urls = config.server_urls
    if not urls:
        yield config
        return
    per_server = min(-(-execution.workers // len(urls)), config.server_concurrency)
    places = {f"{url} {k}": url for k in range(per_server) for url in urls}
    with leased("server", list(places)) as place:
        share = {"server": places[place], "server_concurrency": config.server_concurrency // per_server}
        yield config.model_copy(update=share)


def open_server(config: GenerateConfig) -> "Server":
    """The server as the runtime takes it; its key comes from the environment, never from a configuration."""
    from runtime.decoding.server import Server

    return Server(
        config.server_urls[0],
        config.server_model,
        config.server_concurrency,
        config.server_timeout,
        extra=_fields(config.server_extra),
        key=os.environ.get("OPENAI_API_KEY") or "none",
    )


def _fields(pairs: list[str]) -> dict[str, object]:
    """key=JSON; what is no JSON is text."""
    found: dict[str, object] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found
