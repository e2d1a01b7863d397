"""Broker crashes, transactions and retention need Apache Kafka: collected where DOUBLE11_KAFKA_HOME is set."""

import os

collect_ignore = [] if os.environ.get("DOUBLE11_KAFKA_HOME") else ["test_kafka_faults.py"]
