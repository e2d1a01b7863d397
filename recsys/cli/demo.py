"""double11 demo: the whole path on real retail data, by the commands a user would type.

Each step is a process of its own running the command it prints, so that what works here works by hand. Only the
questions to the server are asked from here, with the client library.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import polars as pl

from recsys.cli.common import parse_time_us
from recsys.cli.replay import table
from recsys.cli.serve import slate_text
from recsys.core.errors import BadInput, Conflict, Double11Error, GateNotMet, Internal, Unavailable
from recsys.data import Dataset
from recsys.replay import read_report
from recsys.replay.compare import iso
from recsys.serving import RecommendClient

HOUSEHOLDS = 200  # the slice: whole histories of the households with the smallest id hash, so that it fits 8 minutes
HELD_OUT_DAYS = 28
CUSTOMERS = 3
SLATE_ITEMS = 8
DEADLINE_MS = 1_000.0
_START_S_MAX = 180.0
_STOP_S_MAX = 30.0
_EVENTS_MIN = 50  # of a customer whose slate is shown
_DAY_US = 86_400_000_000
_ARMS = "popular,own_history,retrieval,rank,full"
_ERRORS: dict[int, type[Double11Error]] = {2: BadInput, 3: GateNotMet, 4: Unavailable}
_COMMAND = (sys.executable, "-c", "from recsys.cli.main import main; main()", "--log-level", "warning")


@dataclass(kw_only=True)
class Demo:
    """One walk through. home: everything is written below it. keep: leave out steps that an earlier walk finished."""

    home: Path
    keep: bool
    took_s: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """The dataset directory."""
        return self.home / "data"

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.home / "run"

    @property
    def url(self) -> str:
        """Log and store."""
        return f"embedded:{self.home / 'live'}"

    def prepare(self) -> None:
        """Start from an empty home, or with `keep` from what is there.

        Raises: Conflict for a folder with other things in it.
        """
        marks = self.home / ".demo"
        if self.home.exists() and not marks.is_dir() and any(self.home.iterdir()):
            raise Conflict(
                f"--home {self.home}", came="a folder with other things in it", expected="a new or an earlier home",
                fix="Choose another --home.",
            )  # fmt: skip
        if self.home.exists() and not self.keep:
            shutil.rmtree(self.home)
        marks.mkdir(parents=True, exist_ok=True)

    def step(self, number: str, name: str, what: str, work: Callable[[], None], *, always: bool = False) -> None:
        """Do one step, say how long it took, and mark it as done for --keep; `always` does it even then."""
        mark = self.home / ".demo" / name
        click.secho(f"\n[{number}/7] {what}", bold=True)
        started_s = time.monotonic()
        if self.keep and mark.exists() and not always:
            click.echo("kept from an earlier demo")
        else:
            work()
            mark.touch()
        self.took_s[name] = time.monotonic() - started_s
        click.echo(f"      {name}: {self.took_s[name]:.1f} s")

    def cut(self) -> str:
        """The start of the held-out weeks, ISO 8601."""
        return iso((Dataset.open(self.data).last_event_us // _DAY_US - HELD_OUT_DAYS) * _DAY_US)

    def stream(self) -> None:
        """Produce what happened before the cut to the durable log, and fold it into the feature store."""
        command("streaming", "init", "--log", self.url)
        command("produce", self.data, "--sink", self.url, "--until", self.cut())
        command("ingest", "--source", self.url, "--store", self.url, "--until-caught-up")


@click.command()
@click.option("--home", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option(
    "--keep", is_flag=True, help="Reuse what an earlier demo in --home imported, streamed, trained, distilled."
)
def demo(home: Path, keep: bool) -> None:
    """Import, stream, train, distil, serve and replay real retail data: the whole path in minutes.

    The data is Complete Journey (200 households of 2017, from a PyPI package); its last four weeks are held out.
    """
    d = Demo(home=home.resolve(), keep=keep)
    d.prepare()
    slice_ = ["--format", "complete-journey", "--option", f"households={HOUSEHOLDS}"]
    d.step("1", "import", "Import Complete Journey", lambda: command("data", "import", *slice_, "--out", d.data))
    cut = d.cut()
    train = ["train", d.data, "--out", d.run, "--until", cut]
    report = d.home / "report"
    replay = ["replay", d.data, "--run", d.run, "--out", report, "--from", cut, "--arms", _ARMS]
    click.echo(f"      held out for step 7: everything from {cut} on")
    d.step("2", "stream", "Produce the events to the durable log, fold them into the feature store", d.stream)
    d.step("3-4", "train", "Train towers and ranker, build the indexes", lambda: command(*train))
    d.step(
        "5", "distill", "Distil the LLM reranker from its teacher", lambda: command("distill", d.data, "--run", d.run)
    )
    d.step("6", "serve", "Serve, and ask for customers over gRPC", lambda: asyncio.run(serve_and_ask(d)), always=True)
    d.step("7", "replay", "Replay the held-out weeks", lambda: command(*replay, quiet=True), always=True)
    click.echo("\n" + table(read_report(report)))
    took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in d.took_s.items())
    click.echo(f"\n{sum(d.took_s.values()):.0f} s in all ({took})")
    click.echo(report / "report.html")


def command(*args: object, quiet: bool = False) -> None:
    """Run `double11 ARGS` as a process, its output shown (`quiet`: only its progress and its errors).

    Raises: the error that its exit code stands for.
    """
    words = [str(arg) for arg in args]
    click.echo(f"    $ {typed(words)}")
    stdout = subprocess.DEVNULL if quiet else None
    done = subprocess.run([*_COMMAND, *words], check=False, stdout=stdout)
    if done.returncode:
        kind = _ERRORS.get(done.returncode, Internal)
        raise kind(
            f"demo: double11 {words[0]}", came=f"exit code {done.returncode}", expected="0",
            fix=f"Its own message is above. Try it alone: {typed(words)}",
        )  # fmt: skip


def typed(words: Sequence[str]) -> str:
    """The command as one would type it in this folder."""
    here = f"{Path.cwd()}/"
    return shlex.join(["double11", *(word.replace(here, "") for word in words)])


async def serve_and_ask(d: Demo) -> None:
    """Start the server on the run and the store, print the slates of a few customers, stop it."""
    words = ["serve", "--run", str(d.run), "--store", d.url, "--log", d.url, "--clock", "data", "--listen"]
    click.echo(f"    $ {typed([*words, '127.0.0.1:50051'])}")
    async with _served([*words, "127.0.0.1:0"], d.home / "serve.log") as target, RecommendClient(target) as client:
        customers = _customers(d)
        for user_id in customers:  # unseen: the first calls of fresh processes fill caches
            await client.recommend(user_id, limit=SLATE_ITEMS, deadline_ms=DEADLINE_MS)
        for user_id, bought in customers.items():
            click.echo(f"\n    $ double11 recommend --target 127.0.0.1:50051 --user {user_id} --limit {SLATE_ITEMS}")
            response = await client.recommend(user_id, limit=SLATE_ITEMS, deadline_ms=DEADLINE_MS)
            click.echo(f"household {user_id}, last bought: {'; '.join(bought)}\n{slate_text(response)}")
            if response.fallbacks:
                click.echo(f"          a stage fell through; the server's own words: {d.home / 'serve.log'}")


@asynccontextmanager
async def _served(words: Sequence[str], log: Path) -> AsyncIterator[str]:
    """HOST:PORT of a server that lives as long as the context.

    Raises: Unavailable when it does not get ready; its messages are in `log`.
    """
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(*_COMMAND, *words, stdout=subprocess.PIPE, stderr=stderr)
        try:
            yield f"127.0.0.1:{await _port(process, log)}"
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                await asyncio.wait_for(process.communicate(), _STOP_S_MAX)  # asyncio lets go of the pipe at its end
            except TimeoutError:
                process.kill()
                await process.wait()


async def _port(process: asyncio.subprocess.Process, log: Path) -> int:
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _START_S_MAX)
    except TimeoutError:
        line = b""
    if not line:
        raise Unavailable(
            "demo: double11 serve", came="not ready", expected=f"ready within {_START_S_MAX:.0f} s", fix=f"Read {log}."
        )
    return int(json.loads(line)["port"])


def _customers(d: Demo) -> dict[str, list[str]]:
    """A few households with a history before the cut, the same ones every time, and what they bought last."""
    dataset = Dataset.open(d.data)
    events = dataset.events(before_us=parse_time_us(d.cut(), "cut"))
    known = events.group_by("user_id").len().filter(pl.col("len") >= _EVENTS_MIN)["user_id"].sort()
    chosen = np.random.default_rng(11).choice(known.to_numpy(), min(CUSTOMERS, len(known)), replace=False)
    titled = events.join(dataset.items().select("item_id", "title"), on="item_id", maintain_order="left")
    return {
        user_id: titled.filter(pl.col("user_id") == user_id).tail(3)["title"].fill_null("?").to_list()
        for user_id in chosen.tolist()
    }
