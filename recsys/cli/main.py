"""Entry point of `double11`: finds the command, turns errors into one message and one exit code.

Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 gate not met, 4 service unavailable.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import click

from recsys.cli.common import emit, only_documents
from recsys.core import logging as core_logging
from recsys.core.errors import Double11Error

# command -> module of recsys.cli; the click command in it carries the same name with _ for -
COMMANDS: dict[str, str] = {
    "bench": "bench",
    "console": "console",
    "data": "data",
    "dead-letter": "streaming",
    "demo": "demo",
    "distill": "distill",
    "doctor": "doctor",
    "features": "features",
    "forget": "streaming",
    "ingest": "streaming",
    "load": "load",
    "peak": "admin",
    "plan": "plan",
    "produce": "streaming",
    "promote": "train",
    "recommend": "serve",
    "replay": "replay",
    "serve": "serve",
    "status": "admin",
    "streaming": "streaming",
    "stress": "load",
    "train": "train",
    "train-online": "train",
}


class LazyGroup(click.Group):
    """Imports a command's module only when it is asked for, so that `double11 --help` is quick and torch-free."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All command names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"recsys.cli.{COMMANDS[cmd_name]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="double11")
@click.option(
    "--log-level",
    type=click.Choice(core_logging.LEVELS),
    default="info",
    show_default=True,
    help="Of the log on stderr.",
)
def cli(log_level: str) -> None:
    """double11: recommendations for the world's largest shopping day."""
    core_logging.configure(log_level)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process."""
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(args: list[str]) -> int:
    """Run one command line in this process and return its exit code."""
    as_json = "--json" in args
    with only_documents() if as_json else nullcontext():
        return _run(args, as_json=as_json)


def _run(args: list[str], *, as_json: bool) -> int:
    try:
        result = cli.main(args, prog_name="double11", standalone_mode=False)
    except Double11Error as error:
        _report(error.as_json(), str(error), as_json=as_json)
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        fix = f"See: {context.command_path if context else 'double11'} --help"
        message = error.format_message()
        _report({"error": {"code": "USAGE", "message": message, "fix": fix}}, f"{message} {fix}", as_json=as_json)
        return 2
    except BrokenPipeError:
        # `double11 ... | head`: nobody reads on, and the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno is None:  # nothing the system said: a TimeoutError that escaped, a bug of ours
            raise
        fix = "Check the path, its permissions and the space that is left."
        _report({"error": {"code": "IO_ERROR", "message": f"{error}.", "fix": fix}}, f"{error}. {fix}", as_json=as_json)
        return 1
    except (KeyboardInterrupt, click.Abort):
        print("double11: interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def _report(document: dict[str, dict[str, str]], message: str, *, as_json: bool) -> None:
    if as_json:
        emit(document, as_json=True, text=str)
    print(f"double11: {message}", file=sys.stderr)


if __name__ == "__main__":  # torchrun starts modules
    main()
