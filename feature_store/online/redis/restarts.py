"""Nothing is written to a Redis that was started anew before it has written its AOF anew, too.

A machine that dies may leave the beginning of a transaction at the end of the AOF. The next start drops it, but cuts
the file (`aof-load-truncated`) behind the last whole command, which may stand behind the MULTI. What is written from
then on follows it, and the start after that applies all of it: offsets of a step without its state. Seen with Redis
6.2. An AOF written anew is made of what is in memory, where no half of a transaction is.

So every bucket knows the run id of its server, and a step is refused by any other. Then the AOF is written anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from redis.cluster import RedisCluster
from redis.exceptions import ResponseError

from feature_store.online.redis.server import Client, errors_of
from recsys.core import Unavailable, logging, metrics

RUN = "run"
# Part of a script: refuses unless the server is the one that the bucket of `off` was last settled on.
REFUSE_ANOTHER_RUN = f"""
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local known = redis.call('HGET', off, '{RUN}') or ''
if known ~= run then return {{'{RUN}', known, run}} end
"""
_log = logging.get_logger(__name__)
_PAUSE_S = 0.01


class Restarts:
    """Notices that servers were started anew, for all buckets of one namespace."""

    def __init__(self, client: Client, what: str, offsets_keys: Sequence[str], wait_s: float) -> None:
        """offsets_keys: of every bucket. wait_s: how long one call waits for an AOF."""
        self._client, self._what, self._keys, self._wait_s = client, what, offsets_keys, wait_s
        self._asked: set[str] = set()

    def settle(self) -> None:
        """Return when no server can bring back half a transaction.

        Raises: Unavailable while an AOF is being written; calling again goes on waiting.
        """
        with errors_of(self._what):
            for target, keys in self._by_server():
                run: str = self._ask(target, "INFO", "server")["run_id"]
                pipe: Any = self._client.pipeline(transaction=False)
                for key in keys:
                    pipe.execute_command("HMGET", key, RUN, "user", "item")
                stored = [[(value or b"").decode() for value in found] for found in pipe.execute()]
                stale = [key for key, (known, *_) in zip(keys, stored, strict=True) if known != run]
                # Where nothing was ever written, nothing can have been torn: the run id is written first.
                if stale and any(known != run and any((known, *sides)) for known, *sides in stored):
                    self._rewrite(target, run)
                for key in stale:
                    pipe.execute_command("HSET", key, RUN, run)
                pipe.execute()

    def _by_server(self) -> list[tuple[Any, list[str]]]:
        if not isinstance(self._client, RedisCluster):
            return [(None, list(self._keys))]
        found: dict[str, tuple[Any, list[str]]] = {}
        for key in self._keys:
            node: Any = self._client.get_node_from_key(key)  # type: ignore[no-untyped-call]
            found.setdefault(node.name, (node, []))[1].append(key)
        return list(found.values())

    def _ask(self, target: Any, *words: str) -> Any:
        execute: Any = self._client.execute_command
        return execute(*words, **({} if target is None else {"target_nodes": target}))

    def _rewrite(self, target: Any, run: str) -> None:
        """Have one server write its AOF anew; without one there is nothing to do."""
        persistence = self._ask(target, "INFO", "persistence")
        if not persistence["aof_enabled"]:
            return
        if run not in self._asked:
            try:
                self._ask(target, "BGREWRITEAOF")
            except ResponseError as error:
                if "in progress" not in str(error):  # a managed Redis may forbid it
                    self._done("refused", cause=str(error))
                    return
            self._asked.add(run)
        until_s = time.monotonic() + self._wait_s
        while (persistence := self._ask(target, "INFO", "persistence"))["aof_rewrite_in_progress"] or persistence[
            "aof_rewrite_scheduled"
        ]:
            if time.monotonic() > until_s:
                raise Unavailable(
                    self._what,
                    came="a server that was started anew and is writing its AOF",
                    expected="an AOF without the half of a transaction",
                    fix="Wait; steps go on by themselves.",
                )
            time.sleep(_PAUSE_S)
        self._done("done" if persistence["aof_last_bgrewrite_status"] == "ok" else "failed")

    def _done(self, outcome: str, **more: str) -> None:
        metrics.AOF_REWRITES.labels(outcome).inc()
        log = _log.info if outcome == "done" else _log.warning
        log("redis_aof_rewritten", store=self._what, outcome=outcome, **more)
