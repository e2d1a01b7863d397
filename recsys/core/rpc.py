"""gRPC settings that both ends of a connection share. No import of grpc: plain options.

A process that hangs, or a host that is gone without a word, leaves its connections open: calls to it run into their
deadlines until the kernel gives up, a quarter of an hour later. Pings find out sooner. Calls go round all addresses of
a name, and those that are added to it are found.
Source: https://grpc.io/docs/guides/keepalive, https://grpc.io/docs/guides/custom-load-balancing.
"""

from __future__ import annotations

import json

CONNECTION_AGE_MS = 30_000
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 3_000),
    ("grpc.keepalive_timeout_ms", 3_000),  # six seconds after its last sign a peer counts as gone
    ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
)
BALANCED = ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]}))
TO_WORKERS = (
    *KEEPALIVE,
    BALANCED,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a restarted worker is found within a second
    # What an attempt to connect may take, 20 s by default: calls wait for it, and the kernel of a process that hangs
    # still takes connections.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),  # half a minute by default
    ("grpc.max_receive_message_length", 16 << 20),
)
SERVER = (
    # gRPC's own, five minutes and none, end a connection that KEEPALIVE looks after
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client asks for addresses again when a connection ends: who was added meanwhile would never be called. Calls and
    # streams under way end in their own time.
    ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
)
