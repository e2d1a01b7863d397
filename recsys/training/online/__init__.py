"""Online training: labelled samples from the log in, deltas to the towers and newer rows of indexes out.

Light: what imports torch is imported by `train_online` when it is called.
"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

from recsys.core import RunDirectory, WallClock, metrics
from recsys.core.config import Config
from recsys.training.config import OnlineConfig

__all__ = ["OnlineConfig", "train_online"]


def train_online(
    run_path: Path, log_url: str, store_url: str, state: Path, config: Config, *, until_caught_up: bool
) -> dict[str, Any]:
    """Train until SIGTERM or SIGINT, or until caught up; what was done.

    Raises: whatever the run, the state, the log and the store raise.
    """
    from feature_store.online import check_exists, open_reader
    from recsys.training.online.trainer import OnlineTrainer
    from streaming.log import open_log, topics_at
    from streaming.topics import StreamingConfig

    run, online = RunDirectory.open(run_path), config.get(OnlineConfig)
    check_exists(store_url)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with open_log(log_url, config) as log:
        topics = topics_at(log_url, config)
        log.create_topics(config.get(StreamingConfig).partitions_by_topic(topics))
        features = open_reader(store_url, config)
        trainer = OnlineTrainer(run, log, topics, features, state, online, WallClock())
        if online.metrics_port:
            metrics.serve_http("training.online.metrics_port", online.metrics_port, online.metrics_host)
        print(json.dumps({"ready": True, "run_id": run.run_id, "sequence": trainer.sequence}), flush=True)
        try:
            deltas = trainer.run(stop.is_set, until_caught_up=until_caught_up)
        finally:
            features.close()
            trainer.close()
    return {"run_id": run.run_id, "sequence": trainer.sequence, "deltas": deltas, "state": str(state)}
