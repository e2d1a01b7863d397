"""Checkpoints of a training in progress, from which it goes on after a kill, on more or fewer ranks than before.

    FOLDER/step-00000500/shard-*.safetensors   what each rank holds (torch distributed checkpoint)
    FOLDER/step-00000500/place.json            written last: which training this is, and where in it

A checkpoint is written under a temporary name by all ranks and renamed by rank 0: whole or absent. On several hosts the
folder is on a file system that all of them see. Nothing is pickled on disk and nothing is unpickled from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from recsys.core import CorruptData, VersionMismatch
from recsys.core.logging import get_logger
from recsys.training.ranks import Ranks

_KEPT = 2
_PLACE = "place.json"
_log = get_logger(__name__)


class Checkpoints:
    """The checkpoints of one training. facts: what must be the same for a checkpoint to belong to it; JSON."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], ranks: Ranks) -> None:
        self._folder, self._facts, self._ranks = folder, json.loads(json.dumps(facts)), ranks

    def save(self, state: dict[str, Any], place: Mapping[str, Any]) -> None:
        """Write what `Sharded.state` gave and the place in the training. Every rank calls it at the same step.

        Raises: OSError on all ranks where the disk of one refuses it.
        """
        final = self._folder / f"step-{place['step']:08d}"
        temporary = self._folder / f".{final.name}.tmp"
        if self._ranks.leads:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._ranks.wait_for_all()
        try:
            save(
                state,
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                process_group=self._ranks.group,
            )
        except CheckpointException as error:
            refused = [e for e, _ in error.failures.values() if isinstance(e, OSError)]
            if not refused:
                raise
            raise OSError(refused[0].errno, refused[0].strerror, str(temporary)) from error
        self._ranks.wait_for_all()
        if self._ranks.leads:
            _write_json(temporary / _PLACE, {"facts": self._facts, "place": place})
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for old in self._all()[:-_KEPT]:
                shutil.rmtree(old)

    def load(self, state: dict[str, Any]) -> Mapping[str, Any] | None:
        """Fill `state` in place from the newest checkpoint; its place, or None when there is none of this training.

        Raises: VersionMismatch for tensors of other names or shapes; CorruptData for files that do not parse.
        """
        newest = self._all()[-1:]
        self._ranks.wait_for_all()  # nobody starts to write before everybody has looked
        if not newest:
            return None
        fix = f"Delete {newest[0]}: training goes on from the one before it, or starts again."
        try:
            kept = json.loads((newest[0] / _PLACE).read_text("utf-8"))
            if kept["facts"] != self._facts:
                _log.warning("checkpoint_of_another_training", path=str(newest[0]))
                return None
            reader = HuggingFaceStorageReader(str(newest[0]))
            stored = {n: tuple(m.size) for n, m in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
            wanted = {n: tuple(t.size()) for n, t in state.items()}
            if stored != wanted:
                raise _mismatch(newest[0], stored, wanted, fix)
            load(state, storage_reader=reader, process_group=self._ranks.group)
        except (SafetensorError, CheckpointException, ValueError, KeyError, OSError) as error:
            raise CorruptData(
                f"checkpoint {newest[0]}", came=f"{error!r:.200}", expected="what training wrote", fix=fix
            ) from error
        place: dict[str, Any] = kept["place"]
        _log.info("training_resumed", path=str(newest[0]), step=place["step"])
        return place

    def _all(self) -> list[Path]:
        return sorted(p for p in self._folder.glob("step-*") if (p / _PLACE).is_file())


def _mismatch(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], fix: str) -> VersionMismatch:
    differ = sorted(n for n in stored.keys() | wanted.keys() if stored.get(n) != wanted.get(n))
    return VersionMismatch(
        f"checkpoint {path}, {differ[0]}",
        came=f"shape {stored.get(differ[0], 'none')} ({len(differ)} tensors differ)",
        expected=f"shape {wanted.get(differ[0], 'none')}, as the settings say",
        fix=fix,
    )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
