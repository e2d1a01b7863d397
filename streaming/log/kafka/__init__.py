"""The Kafka log: one behaviour, two client libraries; a driver's module loads its library."""
