"""Importers of public formats, one file each; `import_dataset` finds the one that is asked for."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from recsys.core.errors import BadInput, Conflict, NotFound
from recsys.core.logging import get_logger
from recsys.data.importers.base import Imported, Importer, Source, loggable
from recsys.data.write import ImportReport, write_dataset

_log = get_logger(__name__)
FORMATS = (
    "amazon-reviews",
    "canonical",
    "complete-journey",
    "movielens",
    "multi-behaviour",
    "online-retail",
    "open-bandit",
    "retailrocket",
    "taobao",
)


def importer(format_: str) -> Importer:
    """The importer of a format. Raises: BadInput for a format there is none for."""
    if format_ not in FORMATS:
        raise BadInput("--format", came=format_, expected=f"one of {', '.join(FORMATS)}", fix="Correct it.")
    module = importlib.import_module(f"recsys.data.importers.{format_.replace('-', '_')}")
    found: Importer = module.IMPORTER
    return found


def import_dataset(
    format_: str, source: Path | None, out: Path, *, options: Mapping[str, str] = MappingProxyType({})
) -> ImportReport:
    """Read `source` (a file or the folder that holds it), check it, and write the dataset directory `out`.

    source None: the data that comes with the format's package (complete-journey).
    Raises: NotFound for a source that is not there; Conflict when `out` exists; BadInput for anything wrong inside,
    with file, line and column.
    """
    chosen = importer(format_)
    if unknown := sorted(set(options) - set(chosen.options)):
        expected = ", ".join(f"{k} ({v})" for k, v in chosen.options.items()) or "no option"
        raise BadInput(f"--option of {format_}", came=", ".join(unknown), expected=expected, fix="Correct it.")
    if source is None:
        if chosen.package_source is None:
            raise BadInput("SRC", came="nothing", expected=f"the {format_} file or its folder", fix="Name it.")
        source = chosen.package_source()
    if not source.exists():
        raise NotFound(f"source {source}", came="no such file or folder", expected=f"{format_} data", fix="Correct it.")
    if out.exists():
        raise Conflict(f"dataset {out}", came="it exists", expected="a new path", fix="Choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".unpacked", dir=out.parent) as scratch:
        found = chosen.read(Source(path=source, options=options, scratch=Path(scratch)))
        items, left_out = loggable(found.items)
        if left_out:
            _log.warning("item_values_left_out", **left_out, of=len(items), fix="keep within what the log takes")
        info = {
            "format": format_,
            "source": source.name,
            "licence": chosen.licence,
            "static_catalogue": found.static_catalogue,
            **found.info,
            **({"item_values_left_out": left_out} if left_out else {}),
        }
        return write_dataset(
            out,
            events=found.events,
            items=items,
            info=info,
            catalog=found.catalog,
            users=found.users,
            rejected=found.rejected,
        )


__all__ = ["FORMATS", "Imported", "Importer", "Source", "import_dataset", "importer"]
