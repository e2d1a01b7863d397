"""The MGETs of many reads on one connection to each server: sent together, answered in order.

redis-py opens the connection (TLS, login, handshake, the cluster's slots); from then on its asyncio transport feeds a
parser of hiredis directly. redis-py's own commands, streams and cluster pipelines cost several times what the server
needs for a read. Only what usually happens is done here: whatever goes wrong (a slot that has moved, a connection that
has gone) is raised, and the caller asks again through redis-py, which knows what to do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import hiredis
from redis.asyncio.cluster import RedisCluster as AsyncCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from feature_store.online.redis.server import AsyncClient

Answers = list[list[bytes | None]]
_BUFFER_BYTES = 256 << 10
_SILENT_S = 1.0  # a connection that says nothing for so long while a read waits is given up
_STANDALONE = None


class Fetcher:
    """The connections of one reader in one event loop; more than `in_flight_max` reads wait for one another."""

    def __init__(self, client: AsyncClient, in_flight_max: int) -> None:
        self.client = client
        self.learning = asyncio.Lock()  # held by the one read that asks for the store's record
        self._in_flight = asyncio.Semaphore(in_flight_max)
        self._opening = asyncio.Lock()
        self._wires: dict[Any, _Wire] = {}

    async def fetch(self, calls: Sequence[Sequence[str]], slots: Sequence[int]) -> Answers:
        """The answer of each MGET: calls are keys of one slot each, or any keys on a standalone server.

        Raises: RedisError, OSError.
        """
        async with self._in_flight:
            if not isinstance(self.client, AsyncCluster):
                return await _answered((await self._wire(_STANDALONE)).ask(calls))
            await self.client.initialize()
            by_node: dict[Any, list[int]] = {}
            for i, slot in enumerate(slots):
                by_node.setdefault(self.client.nodes_manager.get_node_from_slot(slot), []).append(i)
            asked = [((await self._wire(node)).ask([calls[i] for i in at]), at) for node, at in by_node.items()]
            answers: Answers = [[] for _ in calls]
            try:
                for one, at in asked:
                    for i, answer in zip(at, await _answered(one), strict=True):
                        answers[i] = answer
            finally:
                for one, _ in asked:
                    if not one.future.cancel() and not one.future.cancelled():
                        one.future.exception()  # several nodes may have gone: one of them is said
            return answers

    async def _wire(self, node: Any) -> _Wire:
        wire = self._wires.get(node)
        if wire is not None and wire.is_open:
            return wire
        async with self._opening:
            wire = self._wires.get(node)
            if wire is None or not wire.is_open:
                if wire is not None:
                    await self._release(node, self._wires.pop(node).connection)
                wire = self._wires[node] = _Wire(await self._connection(node))
        return wire

    async def _connection(self, node: Any) -> Any:
        if node is _STANDALONE:
            pool: Any = self.client.connection_pool  # type: ignore[union-attr]
            return await pool.get_connection()
        connection = node.acquire_connection()
        try:
            await connection.connect()
        except BaseException:
            node.release(connection)
            raise
        return connection

    async def _release(self, node: Any, connection: Any) -> None:
        await connection.disconnect(nowait=True)
        if node is _STANDALONE:
            pool: Any = self.client.connection_pool  # type: ignore[union-attr]
            await pool.release(connection)
        else:
            node.release(connection)


@dataclass(eq=False, slots=True)
class _Asked:
    """One read: how many answers are left, those that came, since when it waits."""

    wire: _Wire
    future: asyncio.Future[Answers]
    left: int
    since_s: float
    answers: list[Any] = field(default_factory=list)


async def _answered(asked: _Asked) -> Answers:
    try:
        return await asked.future
    except asyncio.CancelledError:
        asked.wire.give_up_if_silent()
        raise


class _Wire(asyncio.BufferedProtocol):
    """One connection, taken over from redis-py with all that it has agreed on with the server."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.is_open = True
        self._loop = asyncio.get_running_loop()
        self._transport: Any = connection._writer.transport
        self._before = self._transport.get_protocol()  # redis-py waits for it when it closes
        self._reader: Any = hiredis.Reader()  # its stub knows of no buffers
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._unsent: list[bytes] = []
        self._waiting: deque[_Asked] = deque()
        self._heard_s = self._loop.time()
        self._transport.set_protocol(self)

    def ask(self, calls: Sequence[Sequence[str]]) -> _Asked:
        """Send MGETs, together with what others ask in this turn of the loop. Raises: RedisConnectionError."""
        if not self.is_open:
            raise RedisConnectionError("the connection has gone")
        pack: Any = hiredis.pack_command  # its stub takes one argument only
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent += [pack(("MGET", *names)) for names in calls]
        asked = _Asked(self, self._loop.create_future(), len(calls), self._loop.time())
        self._waiting.append(asked)
        return asked

    def give_up_if_silent(self) -> None:
        """Close a connection on which nothing comes, so that the next read opens another one."""
        if self._waiting and self._loop.time() - max(self._heard_s, self._waiting[0].since_s) > _SILENT_S:
            self._transport.abort()
            self.is_open = False

    def _send(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self.is_open:
            self._transport.write(data)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport puts what it receives."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what has come and answer whom it is for."""
        self._heard_s = self._loop.time()
        self._reader.feed(self._buffer, 0, nbytes)
        while self._waiting:
            try:
                answer = self._reader.gets()
            except hiredis.ProtocolError as error:
                self._lost(RedisConnectionError(f"no Redis: {error}"))
                self._transport.abort()
                return
            if answer is False:
                return
            if isinstance(answer, hiredis.PushNotification):
                continue
            asked = self._waiting[0]
            asked.answers.append(answer)
            asked.left -= 1
            if not asked.left:
                self._waiting.popleft()
                _finish(asked)

    def eof_received(self) -> bool:
        """The server closes: so do we."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        self._lost(RedisConnectionError(f"the connection has gone: {exc or 'closed'}"))
        self._before.connection_lost(exc)

    def _lost(self, error: Exception) -> None:
        self.is_open = False
        while self._waiting:
            future = self._waiting.popleft().future
            if not future.done():
                future.set_exception(error)


def _finish(asked: _Asked) -> None:
    if asked.future.done():  # its reader has gone
        return
    wrong = [a for a in asked.answers if not isinstance(a, list)]
    if wrong:
        asked.future.set_exception(ResponseError(str(wrong[0])))
    else:
        asked.future.set_result(asked.answers)
