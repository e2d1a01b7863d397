"""`double11 console`: the operators' page."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from recsys.cli.common import config_option


@click.command()
@click.option("--target", default="127.0.0.1:50051", show_default=True, help="HOST:PORT of the gateway's AdminService.")
@click.option("--report", type=click.Path(path_type=Path), help="Folder that `double11 replay --out` wrote.")
@click.option("--listen", default="127.0.0.1:8011", show_default=True, help="HOST:PORT; port 0 = any free one.")
@config_option
def console(target: str, report: Path | None, listen: str, config_path: Path | None) -> None:
    """Show a gateway's state, tiers and parts, and the latest replay, in a browser. Read-only, until Ctrl-C.

    There is no login: keep it on loopback, or behind something that has one.
    """
    from recsys.console import Console
    from recsys.core.config import Config
    from recsys.serving.config import ClientConfig

    server = Console(listen, target, report, Config.load(config_path).get(ClientConfig))
    print(f"http://{server.address}/", file=sys.stderr)
    server.serve_forever()
