"""Deltas: what training changed since a run's snapshot, as records of the `deltas` topic, and their application.

Rows are named by key, never by row number, so that writer and reader need not share a vocabulary's order. A delta may
span messages (parts); it applies whole or not at all: repeats are skipped, a gap is refused, and everything is checked
before the first number changes, so that dense and sparse parts never come from two versions.

Shape legend: R rows, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from double11.v1 import delta_pb2
from google.protobuf.message import DecodeError
from torch import Tensor

from recsys.core import BadInput, CorruptData, VersionMismatch
from recsys.core.index_rows import IndexRows
from recsys.models.embeddings import UNKNOWN_ROW, Vocabulary
from recsys.models.ranker import Ranker
from recsys.models.tower import Tower

UNKNOWN_KEY = -1  # row 0 of a table; keys of ids have the sign bit cleared, so none is -1
_PART_BYTES_MAX = 1 << 19  # of values; well below the 1 MiB a record may have
_PARTS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Rows:
    """Changed rows of one table. keys: int64 [R], distinct; values: float32 [R, D]."""

    keys: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDelta:
    """One version step of a run: 1, 2, 3, ... samples_until_us: newest sample that went in, microseconds UTC.

    index_rows: by index, for gateways (`recsys.serving.deltas`); they are no part of a version, so `decode` leaves them
    out.
    """

    run_id: str
    sequence: int
    tables: Mapping[str, Rows]
    dense: Mapping[str, npt.NDArray[np.float32]]
    samples_until_us: int = 0
    index_rows: Mapping[str, IndexRows] = field(default_factory=dict)


def encode(delta: ModelDelta, *, part_bytes_max: int = _PART_BYTES_MAX) -> list[bytes]:
    """The delta as messages of about `part_bytes_max` bytes of values; a dense tensor is never split."""
    parts = [delta_pb2.Delta()]
    room = part_bytes_max
    for piece, size in _pieces(delta, part_bytes_max):
        if size > room and room < part_bytes_max:
            parts.append(delta_pb2.Delta())
            room = part_bytes_max
        parts[-1].MergeFrom(piece)
        room -= size
    for number, part in enumerate(parts):
        part.run_id, part.sequence, part.samples_until_us = delta.run_id, delta.sequence, delta.samples_until_us
        part.part, part.num_parts = number, len(parts)
    return [part.SerializeToString(deterministic=True) for part in parts]


def decode(messages: list[bytes]) -> ModelDelta:
    """The delta whose parts these are, in any order, repeats allowed.

    Raises: CorruptData for bytes that are no delta, contradict each other, or lack a part.
    """
    parts = {p.part: p for p in map(_parse, messages)}
    first = next(iter(parts.values()), None)
    if first is None or set(parts) != set(range(first.num_parts)):
        came = f"parts {sorted(parts)}"
        raise _corrupt(came, f"parts 0 to {first.num_parts - 1 if first else 0}")
    rows: dict[str, list[Rows]] = {}
    dense: dict[str, npt.NDArray[np.float32]] = {}
    for _, part in sorted(parts.items()):
        if (part.run_id, part.sequence) != (first.run_id, first.sequence):
            raise _corrupt(f"parts of {part.run_id}/{part.sequence} and {first.run_id}/{first.sequence}", "one version")
        for table in part.tables:
            values = _floats(table.values_f32, (len(table.keys), table.dim), table.table)
            rows.setdefault(table.table, []).append(Rows(np.array(table.keys, np.uint64).view(np.int64), values))
        for tensor in part.dense:
            dense[tensor.name] = _floats(tensor.values_f32, tuple(tensor.shape), tensor.name)
    tables = {name: _joined(some, name) for name, some in rows.items()}
    return ModelDelta(
        run_id=first.run_id,
        sequence=first.sequence,
        tables=tables,
        dense=dense,
        samples_until_us=first.samples_until_us,
    )


@dataclass(slots=True)
class DeltaTarget:
    """Tensors of loaded models that deltas change, and the version they have.

    tables: name to (vocabulary, weight [rows, D]); dense: name to tensor. sequence 0 is the snapshot itself.
    on_rows: called with a table and its changed rows when a delta has been applied.
    """

    run_id: str
    tables: Mapping[str, tuple[Vocabulary, Tensor]]
    dense: Mapping[str, Tensor]
    sequence: int = 0
    samples_until_us: int = 0
    on_rows: Callable[[str, npt.NDArray[np.int64]], None] = lambda _table, _rows: None
    _waiting: dict[int, bytes] = field(default_factory=dict)

    def offer(self, message: bytes) -> bool:
        """Take one record of the topic; true when it completed a delta, which is then applied.

        Raises: as `apply`, and CorruptData for bytes that are no delta. Nothing changes in these cases.
        """
        part = _parse(message)
        if part.run_id == self.run_id and part.sequence <= self.sequence:
            return False
        self._check_next(part.run_id, part.sequence)
        self._waiting[part.part] = message
        if len(self._waiting) < part.num_parts:
            return False
        delta = decode(list(self._waiting.values()))
        self._waiting.clear()
        return self.apply(delta)

    def apply(self, delta: ModelDelta) -> bool:
        """Apply a whole delta; false when its sequence is not above ours (a repeat).

        Raises: VersionMismatch for another run, a gap in the sequence, an unknown table, key or tensor, or another
        shape; BadInput for values that are not finite.
        """
        if delta.run_id == self.run_id and delta.sequence <= self.sequence:
            return False
        self._check_next(delta.run_id, delta.sequence)
        found = {name: self._rows_of(name, rows) for name, rows in delta.tables.items()}
        for name, values in delta.dense.items():
            shape = tuple(self.dense[name].shape) if name in self.dense else None
            if shape != values.shape:
                raise _mismatch(f"dense tensor {name}", f"shape {values.shape}", f"{shape or 'no such tensor'}")
            _check_finite(name, values)
        with torch.no_grad():
            for name, rows in delta.tables.items():
                self.tables[name][1][torch.from_numpy(found[name])] = torch.from_numpy(rows.values)
            for name, values in delta.dense.items():
                self.dense[name].copy_(torch.from_numpy(values))
        self.sequence, self.samples_until_us = delta.sequence, delta.samples_until_us
        for name, places in found.items():
            self.on_rows(name, places)
        return True

    def _check_next(self, run_id: str, sequence: int) -> None:
        if run_id != self.run_id:
            raise _mismatch("delta, run", run_id, self.run_id)
        if sequence != self.sequence + 1:
            raise _mismatch("delta, sequence", str(sequence), f"{self.sequence + 1}, the next one")

    def _rows_of(self, name: str, rows: Rows) -> npt.NDArray[np.int64]:
        if name not in self.tables:
            raise _mismatch("delta, table", name, f"one of {', '.join(sorted(self.tables))}")
        vocabulary, weight = self.tables[name]
        if rows.values.shape[1] != weight.shape[1]:
            raise _mismatch(f"delta, table {name}", f"dimension {rows.values.shape[1]}", str(weight.shape[1]))
        _check_finite(name, rows.values)
        found = vocabulary.rows(rows.keys)
        strange = rows.keys[(found == UNKNOWN_ROW) & (rows.keys != UNKNOWN_KEY)]
        if len(strange):
            raise _mismatch(f"delta, table {name}", f"{len(strange)} unknown keys, first {strange[0]}", "known keys")
        return found


def target_of(
    run_id: str, tower: Tower, ranker: Ranker, on_rows: Callable[[str, npt.NDArray[np.int64]], None] | None = None
) -> DeltaTarget:
    """What deltas of a run change in its loaded models: the item tables by key, everything else whole.

    on_rows: see DeltaTarget.
    """
    tables, dense = {}, {}
    for name, vocabulary, net in (
        ("tower", tower.items.vocabulary, tower.net),
        ("ranker", ranker.vocabulary, ranker.net),
    ):
        for path, tensor in net.state_dict().items():
            if path.endswith("item.weight") and path.startswith("tables."):
                tables[f"{name}.item"] = (vocabulary, tensor)
            else:
                dense[f"{name}.{path}"] = tensor
    target = DeltaTarget(run_id, tables, dense)
    if on_rows is not None:
        target.on_rows = on_rows
    return target


def _pieces(delta: ModelDelta, part_bytes_max: int) -> Iterator[tuple[delta_pb2.Delta, int]]:
    for name in sorted(delta.tables):
        rows = delta.tables[name]
        dim = rows.values.shape[1]
        step = max(1, part_bytes_max // (4 * dim + 8))
        for start in range(0, len(rows.keys), step):
            some = rows.keys[start : start + step]
            values = rows.values[start : start + step].astype("<f4").tobytes()
            table = delta_pb2.TableRows(table=name, keys=some.view(np.uint64).tolist(), dim=dim, values_f32=values)
            yield delta_pb2.Delta(tables=[table]), len(values) + 8 * len(some)
    for name in sorted(delta.dense):
        values = delta.dense[name].astype("<f4").tobytes()
        tensor = delta_pb2.DenseTensor(name=name, shape=delta.dense[name].shape, values_f32=values)
        yield delta_pb2.Delta(dense=[tensor]), len(values)
    for index in sorted(delta.index_rows):
        of_index = delta.index_rows[index]
        stop = np.cumsum(of_index.num)
        step = max(1, part_bytes_max // (12 * int(of_index.num.max(initial=0)) + 12))
        for start in range(0, len(of_index), step):
            end = min(start + step, len(of_index))
            entries = slice(int(stop[start] - of_index.num[start]), int(stop[end - 1]))
            piece = delta_pb2.IndexRows(
                index=index,
                keys=of_index.key[start:end].view(np.uint64).tolist(),
                num_entries=of_index.num[start:end].tolist(),
                entry_keys=of_index.entry_key[entries].astype("<i8").tobytes(),
                scores_f32=of_index.score[entries].astype("<f4").tobytes(),
            )
            yield delta_pb2.Delta(index_rows=[piece]), piece.ByteSize()


def _parse(message: bytes) -> delta_pb2.Delta:
    try:
        part = delta_pb2.Delta.FromString(message)
    except DecodeError as error:
        raise _corrupt(str(error), "a double11.v1.Delta") from error
    if not part.run_id or not 0 <= part.part < part.num_parts <= _PARTS_MAX:
        raise _corrupt(f"run {part.run_id!r}, part {part.part} of {part.num_parts}", "a run and a part of its parts")
    return part


def _joined(some: list[Rows], name: str) -> Rows:
    keys = np.concatenate([r.keys for r in some])
    widths = {r.values.shape[1] for r in some}
    if len(widths) > 1 or len(np.unique(keys)) < len(keys):
        raise _corrupt(f"table {name} with dimensions {widths}, {len(keys)} keys", "one dimension, distinct keys")
    return Rows(keys, np.concatenate([r.values for r in some]))


def _floats(data: bytes, shape: tuple[int, ...], name: str) -> npt.NDArray[np.float32]:
    if len(data) != 4 * int(np.prod(shape, dtype=np.int64)):
        raise _corrupt(f"{len(data)} bytes for {name}", f"4 bytes for each of {shape}")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)


def _check_finite(name: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise BadInput(f"delta, {name}", came="values that are not finite", expected="numbers", fix="Stop the trainer.")


def _mismatch(what: str, came: str, expected: str) -> VersionMismatch:
    fix = "Start again from the run's snapshot and read the deltas topic from its first record."
    return VersionMismatch(what, came=came, expected=expected, fix=fix)


def _corrupt(came: str, expected: str) -> CorruptData:
    return CorruptData("delta", came=came, expected=expected, fix="Find out who wrote this record; skip the delta.")
