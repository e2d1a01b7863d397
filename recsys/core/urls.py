"""Where logs and stores are: `embedded:PATH`, `redis://…`, `rediss://…`, `kafka://host:port[/topic]`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from recsys.core.errors import BadInput

SCHEMES = ("embedded", "kafka", "redis", "rediss")
_SERVER = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}")
_TOPIC = re.compile(r"[\w.-]{0,249}", re.ASCII)  # what Kafka allows, or none


def default_url() -> str:
    """`embedded:` the folder $DOUBLE11_HOME, else ./.double11."""
    return f"embedded:{os.environ.get('DOUBLE11_HOME') or '.double11'}"


def scheme(url: str) -> str:
    """The scheme of a log's or store's URL.

    Raises: BadInput for one that double11 does not know.
    """
    name, colon, _ = url.partition(":")
    if not colon or name not in SCHEMES:
        raise BadInput(
            "log or store URL",
            came=url,
            expected="embedded:PATH, kafka://HOST:PORT[/TOPIC] or redis://HOST:PORT",
            fix="Write e.g. embedded:./.double11.",
        )
    return name


def embedded_path(url: str, what: str) -> Path:
    """The folder of an `embedded:PATH` URL.

    Raises: BadInput for an unknown scheme, one that `what` cannot be on, or an empty path.
    """
    name, path = scheme(url), url.partition(":")[2]
    if name != "embedded" or not path:
        raise BadInput(what, came=url, expected="embedded:PATH", fix="Use an embedded: URL with a path.")
    return Path(path)


def kafka_address(url: str, what: str) -> tuple[str, str | None]:
    """Bootstrap servers `host:port[,host:port]` and the topic of a `kafka://...[/TOPIC]` URL.

    Raises: BadInput for another scheme, a missing port or more than one topic.
    """
    name, _, rest = url.partition("://")
    servers, _, topic = rest.partition("/")
    if name != "kafka" or not all(_SERVER.fullmatch(s) for s in servers.split(",")) or not _TOPIC.fullmatch(topic):
        raise BadInput(
            what,
            came=url,
            expected="kafka://HOST:PORT[,HOST:PORT][/TOPIC]",
            fix="Write e.g. kafka://localhost:9092; user and password belong in [streaming.kafka].",
        )
    return servers, topic or None
