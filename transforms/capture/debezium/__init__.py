"""Capture from Debezium's change events: a pure decoder and the Kafka reader that feeds it."""
