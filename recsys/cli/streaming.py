"""`double11 streaming | produce | ingest | dead-letter | forget`: events into the log, and into features."""

from __future__ import annotations

import signal
import uuid
from functools import partial
from pathlib import Path
from threading import Event

import click

from recsys.cli.common import config_option, emit, json_option, parse_time_us
from recsys.core import logging
from recsys.core.clock import WallClock
from recsys.core.config import Config
from recsys.core.errors import BadInput

_log_option = click.option("--log", help="Log URL (default embedded:$DOUBLE11_HOME, else ./.double11).")


@click.group()
def streaming() -> None:
    """Create and look after the durable log."""


@streaming.command()
@_log_option
@click.option("--peak-rate", type=click.FloatRange(min=0, min_open=True), help="Events per second at the peak.")
@click.option(
    "--consumer-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Events per second of one consumer, as `bench ingest` measures them; with --peak-rate.",
)
@config_option
@json_option
def init(
    log: str | None,
    peak_rate: float | None,
    consumer_rate: float | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Create the topics that are missing; running it again is harmless.

    With both rates, too few partitions for the peak are refused before anything is created: they never change.
    """
    from streaming.config import StreamingConfig
    from streaming.log import default_url, open_log, topics_at

    if (peak_rate is None) != (consumer_rate is None):
        fix = "Give both, or neither."
        raise BadInput("streaming init", came="one rate", expected="--peak-rate and --consumer-rate", fix=fix)
    config, url = Config.load(config_path), log or default_url()
    settings = config.get(StreamingConfig)
    if peak_rate is not None and consumer_rate is not None:
        settings.check_peak(peak_rate, consumer_rate)
    partitions = settings.partitions_by_topic(topics_at(url, config))
    with open_log(url, config) as opened:
        opened.create_topics(partitions)
    document = {"log": url, "topics": dict(partitions)}
    emit(document, as_json=as_json, text=lambda: f"{url}: " + ", ".join(f"{t} ({p})" for t, p in partitions.items()))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--sink", required=True, help="Log URL.")
@click.option("--speed", type=float, help="Multiple of the events' own speed (default: as fast as it goes).")
@click.option("--shift-to", help="ISO time that the last event or catalogue change gets; all others move with it.")
@click.option("--from", "from_", help="Only events from this ISO time on (before any shift).")
@click.option("--until", help="Only events before this ISO time (before any shift).")
@config_option
@json_option
def produce(
    directory: Path,
    sink: str,
    speed: float | None,
    shift_to: str | None,
    from_: str | None,
    until: str | None,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Send a dataset directory's events to the log, catalogue changes included."""
    from recsys.core import progress
    from recsys.data import Dataset
    from streaming.log import open_log, topics_at
    from streaming.produce import check_not_future, check_since_1970
    from streaming.produce import produce as send_all

    if speed is not None and not speed > 0:
        raise BadInput("--speed", came=speed, expected="above 0", fix="Leave it out to go as fast as possible.")
    config, dataset, clock = Config.load(config_path), Dataset.open(directory), WallClock()
    before_us, from_us = parse_time_us(until, "--until"), parse_time_us(from_, "--from")
    last_us = dataset.last_change_us  # nothing is sent of a dataset that would be refused at its end
    last_us = last_us if before_us is None else min(last_us, before_us - 1)
    target_us = parse_time_us(shift_to, "--shift-to")
    shift_us = 0 if target_us is None else target_us - last_us
    check_not_future(last_us + shift_us, clock)
    check_since_1970(max(dataset.first_event_us, from_us or 0), last_us, shift_us)
    with open_log(sink, config) as log, progress.bar(total=dataset.num_events, what="produce", unit="events") as bar:
        report = send_all(
            dataset.event_batches(from_us=from_us, before_us=before_us),
            log,
            topics=topics_at(sink, config),
            clock=clock,
            speed=speed,
            shift_us=shift_us,
            stop=_stop_on_signal(),
            on_sent=bar.update,
        )
    document = {"sink": sink, **report.as_json()}
    emit(document, as_json=as_json, text=lambda: f"{report.events:,} events in {sink} ({report.seconds:.1f} s)")


@click.command()
@click.option("--source", required=True, help="Log URL.")
@click.option("--store", required=True, help="Feature store URL.")
@click.option("--archive", type=click.Path(path_type=Path), help="A dataset directory that grows with the log.")
@click.option("--offline", type=click.Path(path_type=Path), help="Offline store for labelled samples; needs --archive.")
@click.option("--until-caught-up", is_flag=True, help="End when what is in the log now has been applied.")
@config_option
@json_option
def ingest(
    source: str,
    store: str,
    archive: Path | None,
    offline: Path | None,
    until_caught_up: bool,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Fold the log into the feature store, each event exactly once, until SIGTERM.

    With an archive and an offline store, impressions become labelled samples there and on the `samples` topic.
    """
    from feature_store.online import open_store
    from recsys.core import metrics, progress
    from streaming.archive import Archive
    from streaming.config import ArchiveConfig, JobConfig, SamplesConfig
    from streaming.job import Job, begun
    from streaming.log import open_log, topics_at
    from streaming.sampler import Sampler

    if offline is not None and archive is None:
        fix = "Add --archive DIR: samples are joined from what it keeps."
        raise BadInput("--offline", came="no --archive", expected="both", fix=fix)
    config = Config.load(config_path)
    topics, settings, stop = topics_at(source, config), config.get(JobConfig), _stop_on_signal()
    if settings.metrics_port:
        metrics.serve_http("streaming.job.metrics_port", settings.metrics_port, settings.metrics_host)
    with open_log(source, config, stop=stop) as log, progress.bar(what="ingest", unit="records") as bar:
        for topic in (topics.events, topics.impressions, topics.catalog):
            # A mistyped source ends here, and makes neither a log nor a store.
            begun(partial(log.num_partitions, topic), settings, stop)
        writer = begun(lambda: open_store(store, config), settings, stop)
        try:
            kept = None
            if archive is not None:
                kept = Archive(archive, source, config.get(ArchiveConfig), offline=offline)
            if kept is not None and offline is not None:
                samples = config.get(SamplesConfig)
                kept.followed_by(Sampler(kept, offline, log.producer(), topics.samples, samples))
            make = partial(Job, log, writer, settings, topics=topics, archive=kept, on_step=bar.update)
            job = begun(make, settings, stop)
            report = job.run(until_caught_up=until_caught_up, stop=stop)
            try:
                if kept is not None:  # before who comes next takes our partitions over
                    kept.flush()
                    if until_caught_up:
                        kept.purge()
            finally:
                job.close()
        finally:
            writer.close()
    document = {"source": source, "store": store, **report.as_json()}
    logging.get_logger(__name__).info("ingest_done", **document)
    summary = ", ".join(f"{n:,} {outcome}" for outcome, n in report.events.items()) or "no new events"
    letters = sum(report.dead_letters.values())
    emit(document, as_json=as_json, text=lambda: f"{summary}; {letters:,} dead letters ({report.seconds:.1f} s)")


@click.group(name="dead-letter")
def dead_letter() -> None:
    """List and requeue records that could not be applied."""


@dead_letter.command("list")
@_log_option
@click.option("--cause", help="Only this cause, e.g. invalid or future.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000))
@config_option
@json_option
def list_(log: str | None, cause: str | None, limit: int, config_path: Path | None, as_json: bool) -> None:
    """Print the newest dead letters: cause, coordinates, size, what came and what was expected; and counts of all."""
    from feature_store.describe import iso
    from streaming.dead_letter import survey
    from streaming.log import default_url, open_log, topics_at

    config, url = Config.load(config_path), log or default_url()
    with open_log(url, config) as opened:
        found = survey(opened, topics_at(url, config).dead_letter, cause=_known(cause), limit=limit)
    rows = [
        {
            "cause": m.cause,
            "topic": m.topic,
            "partition": m.partition,
            "offset": m.offset,
            "event_id": m.event_id,
            "bytes": m.payload_bytes,
            "sha256": m.sha256,
            "at": iso(m.at_us),
            "requeued": m.requeued,
            "detail": m.detail,
        }
        for m in found.newest
    ]

    def text() -> str:
        line = "{cause:16} {topic}/{partition}/{offset}  {bytes} bytes  {state}{detail}"
        lines = [line.format(**r, state="requeued  " if r["requeued"] else "") for r in rows]
        causes = sorted({*found.waiting, *found.requeued})
        counts = [f"{c}: {found.waiting.get(c, 0):,} waiting, {found.requeued.get(c, 0):,} requeued" for c in causes]
        return "\n".join([*lines, *counts]) or "none"

    document = {"dead_letters": rows, "waiting": dict(found.waiting), "requeued": dict(found.requeued)}
    emit(document, as_json=as_json, text=text)


@dead_letter.command()
@_log_option
@click.option("--cause", help="Only this cause, e.g. invalid or future.")
@click.option("--again", is_flag=True, help="Also those that have been requeued before.")
@config_option
@json_option
def requeue(log: str | None, cause: str | None, again: bool, config_path: Path | None, as_json: bool) -> None:
    """Send the records back to their topics, with the event ids they had.

    Each is sent back once: a call goes on where earlier ones ended, also by SIGKILL.
    """
    from recsys.core import progress
    from streaming.dead_letter import requeue as send_back
    from streaming.log import default_url, open_log, topics_at

    config, url = Config.load(config_path), log or default_url()
    with open_log(url, config) as opened, progress.bar(what="requeue", unit="letters") as bar:
        topic = topics_at(url, config).dead_letter
        found = send_back(opened, topic, _known(cause), again=again, on_batch=bar.update)
    text = f"requeued {found.sent:,} ({found.earlier:,} before); {found.cut:,} left, of which only 64 KiB were kept"
    document = {"requeued": found.sent, "requeued_earlier": found.earlier, "left_truncated": found.cut}
    emit(document | {"by_cause": dict(found.by_cause)}, as_json=as_json, text=lambda: text)


def _known(cause: str | None) -> str | None:
    """The cause, if it is one. Raises: BadInput."""
    from streaming.codec import CAUSES

    if cause is not None and cause not in CAUSES:
        raise BadInput("--cause", came=cause, expected=f"one of {', '.join(CAUSES)}", fix="Correct it.")
    return cause


@click.command()
@click.argument("user")
@_log_option
@config_option
@json_option
def forget(user: str, log: str | None, config_path: Path | None, as_json: bool) -> None:
    """Have everything about USER removed from the feature store, for good.

    Item counts and runs already trained are not rewritten.
    """
    from recsys.core import EventBatch, EventKind
    from recsys.core.ids import ID_BYTES_MAX
    from streaming.log import default_url, open_log, topics_at
    from streaming.produce import produce as send_all

    if not 1 <= (size := len(user.encode())) <= ID_BYTES_MAX:
        expected = f"1 to {ID_BYTES_MAX} bytes of UTF-8"
        raise BadInput("USER", came=f"{size} bytes", expected=expected, fix="Give the id that the events carry.")
    config, url = Config.load(config_path), log or default_url()
    event_id, now_us = f"forget-{uuid.uuid4()}", WallClock().now_us()
    batch = EventBatch.from_columns(
        {"event_id": [event_id], "kind": [int(EventKind.FORGET)], "event_time": [now_us], "user_id": [user]}
    )
    with open_log(url, config) as opened:
        send_all([batch], opened, topics=topics_at(url, config))
    emit({"user": user, "event_id": event_id}, as_json=as_json, text=lambda: f"{user} will be forgotten ({event_id})")


def _stop_on_signal() -> Event:
    """Set by SIGTERM and SIGINT: the step under way is finished first."""
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
