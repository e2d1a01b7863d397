"""Prometheus metric names, in one place, so that two parts never count the same thing under two names.

Owners import the metric object from here. Names end in the unit; counters in `_total`.
"""

from __future__ import annotations

from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from recsys.core.errors import Unavailable

_MS_BUCKETS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)

REQUESTS = Counter("double11_requests_total", "Recommend calls by tier and status", ["tier", "status"])
REQUEST_MS = Histogram("double11_request_ms", "Receipt to response, milliseconds", ["tier"], buckets=_MS_BUCKETS)
STAGE_MS = Histogram("double11_stage_ms", "One pipeline stage, milliseconds", ["stage", "outcome"], buckets=_MS_BUCKETS)
FALLBACKS = Counter("double11_fallbacks_total", "Stages that fell through, by reason", ["stage", "reason"])
SHED = Counter("double11_shed_total", "Requests refused by admission control", ["reason"])
IN_FLIGHT = Gauge("double11_in_flight_requests", "Recommend calls being served")
IMPRESSIONS = Counter("double11_impressions_total", "Impression events by outcome", ["outcome"])
MISSING_FEATURES = Counter("double11_missing_features_total", "Feature values replaced by a default", ["feature"])
EVENTS = Counter("double11_events_total", "Events by outcome of the streaming job", ["outcome"])
REDIS_READS_AGAIN = Counter(
    "double11_redis_reads_again_total", "Feature reads repeated after an error of a connection or a slot", ["reason"]
)
AOF_REWRITES = Counter(
    "double11_redis_aof_rewrites_total",
    "AOFs written anew because their Redis was started anew, by outcome",
    ["outcome"],
)
DEAD_LETTERS = Counter("double11_dead_letters_total", "Dead letters by cause", ["cause"])
PURGED = Counter("double11_purged_rows_total", "Archived rows of forgotten users that were rewritten away")
SAMPLES = Counter("double11_samples_total", "Samples of the impression join, by outcome", ["outcome"])
LAG_RECORDS = Gauge("double11_lag_records", "Records not applied yet", ["topic", "partition"])
STEPS_REFUSED = Counter("double11_steps_refused_total", "Steps of the streaming job not taken, by reason", ["reason"])
AWAY_S = Counter("double11_ingest_away_seconds_total", "Time the streaming job waited for store or log", ["of"])
REBALANCES = Counter("double11_rebalances_total", "Changes of the partitions that the streaming job has")
PARTITIONS = Gauge("double11_assigned_partitions", "Partitions that the streaming job has", ["topic"])
GROUP_COMMITS = Counter("double11_group_commits_total", "Offsets told to the consumer group, by outcome", ["outcome"])
TLS_RELOADS = Counter("double11_tls_reloads_total", "Certificates of listeners read again, by outcome", ["outcome"])
PUBLISHED = Counter("double11_published_events_total", "Events taken by EventService.Publish", ["outcome"])
CATALOG_EVENTS = Counter("double11_catalog_events_total", "Catalogue events the gateway has read", ["outcome"])
CATALOG_LAG_S = Gauge(
    "double11_catalog_lag_seconds", "Since the gateway last knew that it had all of the catalogue topic"
)
CATALOG_LAG_RECORDS = Gauge("double11_catalog_lag_records", "Catalogue records the gateway has not read yet")
CATALOG_DELAY_MS = Histogram(
    "double11_catalog_delay_ms", "Append to in force, oldest of a batch, milliseconds", buckets=_MS_BUCKETS
)
CATALOG_RECONNECTS = Counter("double11_catalog_reconnects_total", "Times the gateway began to read the catalogue again")
TEXTS_ENCODED = Counter(
    "double11_texts_encoded_total", "Titles of a training, encoded or kept from before", ["outcome"]
)
TRAINING_SAMPLES = Counter("double11_training_samples_total", "Samples read by train-online, by outcome", ["outcome"])
DELTAS = Counter(
    "double11_deltas_total",
    "Deltas by outcome: published by training, applied or refused by serving, unreadable: passed over",
    ["outcome"],
)
DELTA_SEQUENCE = Gauge("double11_delta_sequence", "Sequence of the delta in force, 0 = the run itself", ["run_id"])
DELTA_AGE_S = Gauge("double11_delta_age_seconds", "Now less the newest sample in the delta in force")
RERANK_BATCH_ITEMS = Histogram(
    "double11_rerank_batch_items", "Candidates per engine batch", buckets=(1, 8, 16, 32, 64, 128, 256, 512)
)
RERANK_QUEUE_MS = Histogram(
    "double11_rerank_queue_ms", "Wait before an engine batch, milliseconds", buckets=_MS_BUCKETS
)
RERANK_BATCH_TOKENS = Histogram(
    "double11_rerank_batch_tokens",
    "Tokens computed per engine batch",
    buckets=(16, 64, 256, 512, 1024, 2048, 4096, 8192),
)
RERANK_DEPTH = Histogram(
    "double11_rerank_depth_items", "Candidates scored per request", buckets=(0, 1, 8, 16, 32, 64, 128, 256, 512)
)
RERANK_CUT = Counter("double11_rerank_cut_total", "Requests of which the time allowed fewer candidates than asked")
RERANK_REFUSED = Counter(
    "double11_rerank_refused_total", "Requests that no batch took: queue-full, given-up for others, late", ["reason"]
)
RERANK_GRAPHS_OFF = Counter(
    "double11_rerank_graphs_off_total",
    "Times a CUDA forward could not be recorded, and is launched kernel by kernel since",
)
RERANK_SCORE_CACHE = Counter("double11_rerank_score_cache_total", "Score cache look-ups", ["outcome"])
RERANK_PREFIX_CACHE = Counter("double11_rerank_prefix_cache_total", "Prefix cache look-ups", ["outcome"])
WORKER_RESTARTS = Counter(
    "double11_worker_restarts_total", "Supervised processes that died and were restarted", ["worker"]
)
INDEX_ITEMS = Gauge("double11_index_items", "Items of the live index: base and delta alive, dead rows", ["part"])
INDEX_REBUILDS = Counter("double11_index_rebuilds_total", "Rebuilds of the live index by outcome", ["outcome"])
INDEX_SNAPSHOTS = Counter("double11_index_snapshots_total", "Snapshots of the live index by outcome", ["outcome"])
INDEX_UPDATES = Counter("double11_index_updates_total", "Catalogue events by what the live index did", ["outcome"])
INDEX_SHARDS_MISSING = Counter(
    "double11_index_shards_missing_total",
    "Searches that went without a shard of the index, by reason",
    ["shard", "reason"],
)
INDEX_RECALL = Histogram(
    "double11_index_recall",
    "Share of the exact neighbours that a sampled query found",
    buckets=(0.5, 0.8, 0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0),
)
INDEX_RECALL_SAMPLES = Counter("double11_index_recall_samples_total", "Sampled queries by outcome", ["outcome"])


def serve_http(setting: str, port: int, host: str) -> tuple[WSGIServer, Thread]:
    """Serve all metrics as Prometheus text over HTTP from a thread. setting: where the port is from, for the error.

    Raises: Unavailable when the address is taken or not this host's.
    """
    try:
        return start_http_server(port, host)
    except OSError as error:
        raise Unavailable(
            f"{setting} {port}",
            came=f"{error} ({host}:{port})",
            expected="a free address of this host",
            fix="Choose another port, or 0 for no metrics over HTTP.",
        ) from error
