"""Sends campus C's committed changes to a topic, as LogMiner and Debezium's connector would."""

import collections.abc
import decimal
import json
import pathlib

import psycopg
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from psycopg import sql

from runners.embedded.campus_c import SCHEMA
from runners.embedded.logminer import Commit, Event, Redo, Transaction, marked, snapshot_event
from runners.embedded.oracle_tables import OracleTable, oracle_tables
from schemas.errors import CampusSyncError

_SENDING = 4402  # The advisory lock of whoever sends.
_FETCH_ROWS = 2000
_ANSWER_S = 30.0
_SCRIPT = pathlib.Path(__file__).with_name("redo.sql")
_BEGUN = "SELECT to_regclass('redo.change') IS NOT NULL"
_TRANSACTIONS = """\
SELECT tx::text::bigint, min(seq), max(seq),
    (extract(epoch FROM coalesce(pg_xact_commit_timestamp(tx::xid), max(changed_at)))
        * 1000000)::bigint
FROM redo.change GROUP BY tx ORDER BY min(seq)"""
_CHANGES = """\
SELECT seq, op::text, table_name, before::text, after::text,
    (extract(epoch FROM changed_at) * 1000000)::bigint
FROM redo.change WHERE seq BETWEEN %s AND %s ORDER BY seq"""
_NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


class ConnectorError(CampusSyncError):
    """The topic takes nothing; the text names it and the remedy."""


class Connector:
    """Reads the redo log of campus C's tables (redo.sql) and sends it, transaction by transaction.

    The first `send` enables the redo log and sends a snapshot of all tables, as the real one
    does at its first start. What was committed and not sent, whoever wrote it and whatever
    died, is sent by the next `send`, in order of the commits. What a broken `send` may have sent
    it sends again, the same events: readers know repeats, as they must of the real one.

    Args:
      dsn: connection string of the database, as its owner. bootstrap, topic: of Kafka.
    """

    def __init__(self, dsn: str, bootstrap: str, topic: str):
        self._dsn, self._topic = dsn, topic
        self._settings = {
            "bootstrap.servers": bootstrap,
            "client.id": "campus-sync-connector",
            "enable.idempotence": True,  # Nothing is lost or overtaken on the way.
            "linger.ms": 0,
            "reconnect.backoff.max.ms": 500,
            "delivery.timeout.ms": int(_ANSWER_S * 1000),
            "log_level": 0,
        }
        self._connection: psycopg.Connection | None = None
        self._producer: Producer | None = None
        self._refused: KafkaError | None = None
        self._tables = oracle_tables()

    def close(self) -> None:
        """Ends the connections."""
        self._forget()

    def send(self, begin: bool = True) -> int:
        """Sends all that is committed; returns how many row changes, or rows of the snapshot.

        Args:
          begin: take the snapshot if there was none yet; else nothing is sent then.

        Raises:
          ConnectorError: the topic does not take it. psycopg.Error: of the database.
        """
        done = False
        try:
            if self._connection is None:
                self._connection = psycopg.connect(self._dsn, autocommit=True, connect_timeout=10)
            with self._connection.transaction():
                # What was sent is taken from the log in this transaction: it ends after Kafka
                # has answered, and nobody else sends meanwhile.
                self._connection.execute("SELECT pg_advisory_xact_lock(%s)", [_SENDING])
                if self._connection.execute(_BEGUN).fetchone()[0]:
                    sent = self._send_changes()
                else:
                    sent = self._send_snapshot() if begin else 0
            done = True
        finally:
            if not done:
                self._forget()
        return sent

    def _send_changes(self) -> int:
        connection, sent = self._connection, 0
        commits = [Commit(*row) for row in connection.execute(_TRANSACTIONS)]
        for commit in commits:
            transaction = Transaction(commit, self._tables)
            self._produce(transaction.begin())
            with connection.cursor("changes") as cursor:
                cursor.itersize = _FETCH_ROWS
                for row in cursor.execute(_CHANGES, [commit.first, commit.last]):
                    for event in transaction.events(_redo(row)):
                        self._produce(event)
                    sent += 1
            self._produce(transaction.end())
        if commits:
            self._flush()
            connection.execute("DELETE FROM redo.change WHERE seq <= %s", [commits[-1].last])
        return sent

    def _send_snapshot(self) -> int:
        connection, sent = self._connection, 0
        # Its triggers lock the tables: nothing is written until the snapshot is sent.
        connection.execute(_SCRIPT.read_text(encoding="utf-8"))
        (now_us,) = connection.execute(_NOW).fetchone()
        for table, row, marker in marked(self._rows()):
            self._produce(snapshot_event(table, row, marker, 0, now_us))
            sent += 1
        self._flush()
        return sent

    def _rows(self) -> collections.abc.Iterator[tuple[OracleTable, collections.abc.Iterator[dict]]]:
        for table in self._tables.values():
            name = sql.Identifier(SCHEMA, table.name)
            keys = sql.SQL(", ").join(map(sql.Identifier, table.key))
            query = sql.SQL("SELECT to_jsonb(t)::text FROM {} t ORDER BY {}").format(name, keys)
            yield table, self._read(query)

    def _read(self, query: sql.Composed) -> collections.abc.Iterator[dict]:
        with self._connection.cursor("snapshot") as cursor:
            cursor.itersize = _FETCH_ROWS
            for (text,) in cursor.execute(query):
                yield _loads(text)

    def _produce(self, event: Event) -> None:
        if self._producer is None:
            self._producer, self._refused = Producer(self._settings), None
        headers = list(event.headers)
        while True:
            try:
                self._producer.produce(
                    *(self._topic, event.value, event.key),
                    partition=0,
                    headers=headers,
                    on_delivery=self._answered,
                )
                break
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as error:
                raise self._failure(error.args[0].name()) from error
        self._producer.poll(0)
        if self._refused is not None:
            raise self._failure(self._refused.name())

    def _flush(self) -> None:
        if self._producer is None:
            return
        left = self._producer.flush(_ANSWER_S)
        if left or self._refused is not None:
            raise self._failure(self._refused.name() if self._refused else "no answer")

    def _answered(self, error: KafkaError | None, _: Message) -> None:
        self._refused = self._refused or error

    def _failure(self, cause: str) -> ConnectorError:
        return ConnectorError(
            f"topic {self._topic} takes no events ({cause}). Remedy: start its broker; see "
            "`world status`. What is committed will be sent."
        )

    def _forget(self) -> None:
        """Drops what is on its way: it will be sent again."""
        if self._producer is not None:
            self._producer.purge()
            self._producer = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _redo(row: tuple) -> Redo:
    seq, op, table, before, after, changed_us = row
    return Redo(seq, op, table, _loads(before), _loads(after), changed_us)


def _loads(text: str | None) -> dict | None:
    return None if text is None else json.loads(text, parse_float=decimal.Decimal)
