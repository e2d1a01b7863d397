"""gRPC settings that both ends of a connection share. No import of grpc: plain options.

A process that hangs, or a host that is gone without a word, leaves its connections open: calls to it run into their
deadlines until the kernel gives up, a quarter of an hour later. Pings find out sooner.
Source: https://grpc.io/docs/guides/keepalive.
"""

from __future__ import annotations

import json

KEEPALIVE = (
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 3_000),  # six seconds after its last sign a peer counts as gone
    ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
)
TO_WORKERS = (
    *KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a restarted worker is found within a second
    ("grpc.max_receive_message_length", 16 << 20),
)
SERVER = (  # gRPC's own, five minutes and none, end a connection that KEEPALIVE looks after
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
