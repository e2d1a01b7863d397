"""Reaching a Redis: the URL, clients of bounded patience, errors of ours, and the settings that a writer needs.

    redis[s]://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]...][/DB][?cluster=true]

Several hosts, or ?cluster=true, are a Redis Cluster; the hosts are where its nodes are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
import redis.asyncio as aredis
from redis.asyncio.cluster import ClusterNode as AsyncNode
from redis.asyncio.cluster import RedisCluster as AsyncCluster
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from feature_store.config import RedisStoreConfig
from recsys.core import BadInput, NotFound, Overloaded, Unavailable, VersionMismatch, logging

_log = logging.get_logger(__name__)
_PORT = 6379
_RETRIES = 3
_BACKOFF_BASE_S, _BACKOFF_CAP_S = 0.02, 0.5

Client = redis.Redis | RedisCluster
AsyncClient = aredis.Redis | AsyncCluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A parsed URL. Its text has no password."""

    hosts: tuple[tuple[str, int], ...]
    is_cluster: bool
    is_tls: bool
    db: int
    username: str | None
    password: str | None = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises: BadInput with the part that is wrong."""
        try:
            parts = urlsplit(url)
            login, _, places = parts.netloc.rpartition("@")
            hosts = tuple(_host(place) for place in places.split(","))
            username, _, password = login.partition(":")
            query = parse_qs(parts.query, strict_parsing=bool(parts.query))
            is_cluster = {"true": True, "false": False}[
                query.pop("cluster", ["true" if len(hosts) > 1 else "false"])[0]
            ]
            db = int(parts.path.strip("/") or 0)
        except (ValueError, KeyError) as error:
            raise _bad_url(url, f"{error} in") from error
        if query or parts.fragment or db < 0 or (is_cluster and db) or (not is_cluster and len(hosts) > 1):
            raise _bad_url(url, "")
        return cls(
            hosts=hosts,
            is_cluster=is_cluster,
            is_tls=parts.scheme == "rediss",
            db=db,
            username=unquote(username) or None,
            password=unquote(password) or None,
        )

    def __str__(self) -> str:
        places = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{'rediss' if self.is_tls else 'redis'}://{places}" + (f"/{self.db}" if self.db else "")

    def client(self, config: RedisStoreConfig) -> Client:
        """A synchronous client. Raises: NotFound for a password file that is not there."""
        options = self._options(config) | {"retry": Retry(_backoff(), _RETRIES)}
        if self.is_cluster:
            nodes = [ClusterNode(h, p) for h, p in self.hosts]  # type: ignore[no-untyped-call]
            return RedisCluster(startup_nodes=nodes, **options)
        (host, port), *_ = self.hosts
        return redis.Redis(host=host, port=port, db=self.db, **options)

    def async_client(self, config: RedisStoreConfig) -> AsyncClient:
        """An asynchronous client of bounded connections, for the running event loop."""
        # No timeout of each answer: the reader bounds the whole of a read, which costs a timer instead of four.
        options = self._options(config) | {"retry": AsyncRetry(_backoff(), 1), "socket_timeout": None}
        if self.is_cluster:
            nodes = [AsyncNode(h, p) for h, p in self.hosts]
            return AsyncCluster(startup_nodes=nodes, max_connections=config.connections_max, **options)
        (host, port), *_ = self.hosts
        kind = aredis.SSLConnection if self.is_tls else aredis.Connection
        options.pop("ssl", None)
        pool = aredis.BlockingConnectionPool(
            connection_class=kind,
            max_connections=config.connections_max,
            timeout=config.timeout_s,
            host=host,
            port=port,
            db=self.db,
            **options,
        )
        return aredis.Redis.from_pool(pool)

    def _options(self, config: RedisStoreConfig) -> dict[str, Any]:
        options: dict[str, Any] = {
            "username": self.username,
            "password": self.password,
            "socket_timeout": config.timeout_s,
            "socket_connect_timeout": config.timeout_s,
        }
        if config.password_file is not None:
            try:
                options["password"] = config.password_file.read_text("utf-8").strip()
            except OSError as error:
                raise NotFound(
                    "[feature_store.redis] password_file",
                    came=str(error),
                    expected="a readable file with the password",
                    fix="Correct the path, or mount the secret.",
                ) from error
        if self.is_tls:
            options["ssl"] = True
            if config.ca_file is not None:
                options["ssl_ca_certs"] = str(config.ca_file)
        return options


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Errors of redis-py as ours.

    Raises: BadInput for a login or a certificate, Overloaded for a full server, Unavailable.
    """
    try:
        yield
    except (AuthenticationError, AuthorizationError) as error:
        raise BadInput(
            what, came=str(error), expected="a login that it takes", fix="Set password_file or the URL's login."
        ) from error
    except ResponseError as error:
        # A script says so in its own words when its first write was refused.
        if not isinstance(error, OutOfMemoryError) and "OOM" not in str(error):
            raise _unavailable(what, error) from error
        raise Overloaded(
            what,
            came=str(error),
            expected="memory below maxmemory",
            fix="Raise maxmemory or add nodes; nothing is lost, the step runs again.",
        ) from error
    except RedisConnectionError as error:
        if "CERTIFICATE_VERIFY_FAILED" not in str(error):  # redis-py keeps no more of it
            raise _unavailable(what, error) from error
        raise BadInput(
            what,
            came=str(error),
            expected="a certificate that we can verify",
            fix="Set [feature_store.redis] ca_file to the server's authority, or renew the certificate.",
        ) from error
    except (RedisError, RedisClusterException, OSError) as error:  # down, loading, failing over
        raise _unavailable(what, error) from error


def check_server(client: Client, what: str) -> None:
    """Settings that a writer needs: warns when AOF is off, refuses eviction of keys without a TTL.

    Raises: VersionMismatch for such a `maxmemory-policy`; Unavailable.
    """
    try:
        execute: Any = client.execute_command
        targets: list[dict[str, Any]] = [{}]
        if isinstance(client, RedisCluster):
            targets = [{"target_nodes": n} for n in client.get_primaries()]  # type: ignore[no-untyped-call]
        found: dict[str, set[str]] = {"appendonly": set(), "maxmemory-policy": set()}
        for target in targets:
            for name, values in found.items():
                values.update(_text(v) for v in execute("CONFIG GET", name, **target).values())
    except ResponseError as error:  # a managed Redis may hide CONFIG
        _log.warning("redis_settings_unknown", store=what, cause=str(error))
        return
    evicting = sorted(p for p in found["maxmemory-policy"] if p.startswith("allkeys"))
    if evicting:
        raise VersionMismatch(
            f"maxmemory-policy of {what}",
            came=f"{evicting[0]}, which deletes feature state and offsets",
            expected="noeviction or a volatile- policy",
            fix="redis-cli CONFIG SET maxmemory-policy noeviction, and in redis.conf.",
        )
    if "no" in found["appendonly"]:
        fix = "redis-cli CONFIG SET appendonly yes: without it a restart loses everything since the last snapshot"
        _log.warning("redis_aof_off", store=what, fix=fix)


def _unavailable(what: str, error: Exception) -> Unavailable:
    return Unavailable(
        what,
        came=f"{type(error).__name__}: {error}",
        expected="an answer",
        fix="Look at the server; the writer goes on from the stored offsets when started again.",
    )


def _backoff() -> ExponentialBackoff:
    return ExponentialBackoff(cap=_BACKOFF_CAP_S, base=_BACKOFF_BASE_S)


def _host(place: str) -> tuple[str, int]:
    parts = urlsplit(f"//{place}")
    if not parts.hostname:
        raise ValueError("no host")
    return parts.hostname, parts.port or _PORT


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _bad_url(url: str, why: str) -> BadInput:
    safe = url if "@" not in url else f"{url.partition('://')[0]}://...@{url.rpartition('@')[2]}"
    return BadInput(
        "store URL",
        came=f"{why} {safe}".strip(),
        expected="redis://[USER:PASSWORD@]HOST:PORT[/DB], or HOST:PORT,HOST:PORT or ?cluster=true of a cluster",
        fix="Correct the URL; a cluster has no databases.",
    )
