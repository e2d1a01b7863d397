"""The MGETs of one read, sent at once and answered on the connections of redis-py's own pools.

redis-py's commands and cluster pipelines cost several times what the server needs for them. Only what usually happens
is done here: whatever goes wrong (a slot that has moved, a connection that has gone) is raised, and the caller asks
again through redis-py, which knows what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio.cluster import RedisCluster as AsyncCluster

from feature_store.online.redis.server import AsyncClient

Answers = list[list[bytes | None]]


async def fetch(client: AsyncClient, calls: Sequence[Sequence[str]], slots: Sequence[int]) -> Answers:
    """The answer of each MGET: calls are keys of one slot each, or any keys on a standalone server.

    Raises: RedisError, OSError; connections whose answers were not read to the end are closed.
    """
    if not isinstance(client, AsyncCluster):
        pool: Any = client.connection_pool
        connection = await pool.get_connection()
        try:
            return await _asked(connection, calls)
        finally:
            await pool.release(connection)
    await client.initialize()
    by_node: dict[Any, list[int]] = {}
    for i, slot in enumerate(slots):
        by_node.setdefault(client.nodes_manager.get_node_from_slot(slot), []).append(i)
    answers: Answers = [[] for _ in calls]
    asked: list[tuple[Any, Any, list[int]]] = []
    try:
        for node, at in by_node.items():
            asked.append((node, node.acquire_connection(), at))
            await _send(asked[-1][1], [calls[i] for i in at])
        while asked:
            node, connection, at = asked[-1]
            for i in at:
                answers[i] = await connection.read_response(disable_decoding=True)
            node.release(connection)
            asked.pop()
    finally:
        for node, connection, _ in asked:
            await connection.disconnect(nowait=True)
            node.release(connection)
    return answers


async def _asked(connection: Any, calls: Sequence[Sequence[str]]) -> Answers:
    done = False
    try:
        await _send(connection, calls)
        answers = [await connection.read_response(disable_decoding=True) for _ in calls]
        done = True
        return answers
    finally:
        if not done:
            await connection.disconnect(nowait=True)


async def _send(connection: Any, calls: Sequence[Sequence[str]]) -> None:
    pack: Any = hiredis.pack_command  # its stub takes one argument only
    packed = b"".join(pack(("MGET", *names)) for names in calls)
    await connection.send_packed_command(packed, check_health=False)
