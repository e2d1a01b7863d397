"""`double11 data`: import public logs, simulate a Double 11."""

from __future__ import annotations

from pathlib import Path

import click

from recsys.cli.common import emit, json_option, seed_option
from recsys.core.errors import BadInput


@click.group()
def data() -> None:
    """Make dataset directories: import public logs or simulate a world."""


@data.command("import")
@click.argument("src", required=False, type=click.Path(path_type=Path))
@click.option("--format", "format_", required=True, help="See `double11 data formats`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new directory.")
@click.option("--option", "options", multiple=True, metavar="K=V", help="An option of the format.")
@json_option
def import_(src: Path | None, format_: str, out: Path, options: tuple[str, ...], as_json: bool) -> None:
    """Import SRC (a file or the folder that holds it); complete-journey reads its package when SRC is left out."""
    from recsys.data import import_dataset

    report = import_dataset(format_, src, out, options=_options(options))
    emit(report.as_json(), as_json=as_json, text=lambda: _text(report.as_json()))


@data.command()
@click.option(
    "--preset", default="small", show_default=True, help="tiny, small, double11 or crowd (10 million events each)."
)
@seed_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new directory.")
@json_option
def simulate(preset: str, seed: int, out: Path, as_json: bool) -> None:
    """Simulate four weeks of warm-up and a Double 11; the same preset and seed give the same bytes."""
    from recsys.data import simulate as run

    report = run(preset, seed, out)
    emit(report.as_json(), as_json=as_json, text=lambda: _text(report.as_json()))


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
def check(directory: Path, as_json: bool) -> None:
    """Read a dataset directory to its end and compare it with the hash it was written with."""
    from recsys.data import Dataset

    dataset = Dataset.open(directory)
    found = {"directory": str(directory), "num_events": dataset.num_events, "hash": dataset.verify()}
    emit(found, as_json=as_json, text=lambda: f"{directory}: {dataset.num_events:,} events, as written")


@data.command()
@json_option
def formats(as_json: bool) -> None:
    """List the formats and their options."""
    from recsys.data.importers import FORMATS, importer

    found = {name: dict(importer(name).options) for name in FORMATS}
    lines = [f"{n}" + "".join(f"\n    --option {k}=...  {v}" for k, v in o.items()) for n, o in found.items()]
    emit(found, as_json=as_json, text=lambda: "\n".join(lines))


def _options(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise BadInput("--option", came=pair, expected="KEY=VALUE", fix="Write e.g. --option households=500.")
    return dict(pair.split("=", 1) for pair in pairs)


def _text(report: dict[str, object]) -> str:
    rejected = report["rejected"]
    assert isinstance(rejected, dict)
    aside = ", ".join(f"{n:,} {cause}" for cause, n in rejected.items())
    return (
        f"{report['out']}: {report['num_events']:,} events, {report['num_users']:,} users, "
        f"{report['num_items']:,} items"
        + (f"\nset aside (rejected.parquet): {aside}" if aside else "")
        + f"\nhash {report['hash']}"
    )
