"""Consult stores that clients edit, and the exchange between them, moved by hand."""

import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import psycopg
import yaml

from schemas.config import Config, load
from schemas.conflict_policy import ConflictRules, load_conflict_rules
from schemas.siblings import Record
from transforms.deliver import store_schema
from transforms.deliver.edits.exchange_records import Puller, connect, fold_pending
from transforms.deliver.edits.hold_records import Records
from transforms.deliver.edits.open_store import open_store
from transforms.deliver.edits.record_keys import Key
from transforms.seal_dead_letters import make_key

RULES: ConflictRules = load_conflict_rules()
PLAN = "treatment_plan"
HOUR_US = 3_600_000_000


class EditedStore:
    """One store: `client` is anybody's SQL session, the exchange has sessions of its own."""

    def __init__(self, name: str, dsn: str, skew_us: int = 0):
        self.name, self.dsn = name, dsn
        with psycopg.connect(dsn) as conn:
            store_schema.ensure(conn)
            open_store(conn, name, RULES)
            conn.execute("UPDATE sync.store SET clock_offset_us = %s", (skew_us,))
        self.client = psycopg.connect(dsn, autocommit=True)
        self.own = connect(dsn)
        self.pullers: dict[str, Puller] = {}

    def close(self) -> None:
        self.client.close()
        self.own.close()

    def as_(self, editor: str = "D1", role: str = "attending", lane: str = "routine") -> None:
        """Says who the client is from now on."""
        for name, value in (("editor", editor), ("role", role), ("lane", lane)):
            self.client.execute("SELECT set_config(%s, %s, false)", (f"campus_sync.{name}", value))

    def insert(self, record_id: str, table: str = PLAN, campus: str = "main", **values) -> None:
        names = ["campus", "record_id", *values]
        places = ", ".join(["%s"] * len(names))
        self.client.execute(
            f"INSERT INTO consult.{table} ({', '.join(names)}) VALUES ({places})",
            (campus, record_id, *values.values()),
        )

    def update(self, record_id: str, table: str = PLAN, **values) -> int:
        sets = ", ".join(f"{name} = %s" for name in values)
        return self.client.execute(
            f"UPDATE consult.{table} SET {sets} WHERE record_id = %s",
            (*values.values(), record_id),
        ).rowcount

    def delete(self, record_id: str, table: str = PLAN) -> int:
        return self.client.execute(
            f"DELETE FROM consult.{table} WHERE record_id = %s", (record_id,)
        ).rowcount

    def row(self, record_id: str, *columns: str, table: str = PLAN) -> tuple | None:
        return self.client.execute(
            f"SELECT {', '.join(columns)} FROM consult.{table} WHERE record_id = %s", (record_id,)
        ).fetchone()

    def fold(self) -> int:
        """Takes all edits in that wait; returns how many records changed."""
        changed = 0
        while now := fold_pending(self.own, RULES).changed:
            changed += now
        return changed

    def pull(self, peer: "EditedStore") -> int:
        """Pulls all that a peer has; returns how many records changed here."""
        puller = self.pullers.setdefault(peer.name, Puller(self.own, peer.own, RULES))
        learned = 0
        while True:
            pulled = puller.pull()
            learned += pulled.learned
            if not pulled.behind:
                return learned

    def record(self, record_id: str, table: str = PLAN, campus: str = "main") -> Record:
        return Records(self.own, RULES).read(Key(table, campus, record_id))

    def open_conflicts(self) -> int:
        query = "SELECT count(*) FROM sync.conflict WHERE state = 'open'"
        return self.own.execute(query).fetchone()[0]

    def digest(self) -> str:
        """Returns the digest of all records, their rows and their conflicts."""
        rows = self.own.execute(
            "SELECT record_id, table_name, campus, record::text FROM sync.record ORDER BY 1, 2, 3"
        ).fetchall()
        for table in RULES.edited_at_stores:
            rows += self.own.execute(
                f"SELECT to_jsonb(t)::text FROM consult.{table} t WHERE version_vector IS NOT NULL"
                " ORDER BY record_id, campus"
            ).fetchall()
        rows += self.own.execute(
            "SELECT id, rule, versions FROM sync.conflict WHERE state <> 'closed' ORDER BY 1"
        ).fetchall()
        return hashlib.sha256(repr(rows).encode()).hexdigest()


def settle(stores: Sequence[EditedStore], pairs: Iterable[tuple[int, int]] | None = None) -> int:
    """Exchanges until nobody learns anything; returns the rounds. By default every pair."""
    pairs = list(pairs or itertools.permutations(range(len(stores)), 2))
    for rounds in range(1, 20):
        moved = sum(store.fold() for store in stores)
        moved += sum(stores[a].pull(stores[b]) for a, b in pairs)
        if not moved:
            return rounds
    raise AssertionError("records go in circles")


def agree(stores: Sequence[EditedStore]) -> bool:
    """Whether all stores hold, show and ask the same."""
    return len({store.digest() for store in stores}) == 1


def config_of(folder: pathlib.Path, dsns: Mapping[str, str]) -> Config:
    """Writes a campuses.yaml of these stores; its source is never asked for anything."""
    make_key(folder / "key")
    source = {"kind": "postgresql", "dsn": "host=127.0.0.1 port=9", "mapping": "postgresql_his"}
    content = {
        "version": 1,
        "sources": {"campus": source},
        "stores": {name: {"dsn": dsn} for name, dsn in dsns.items()},
        "dead_letter_key": "file:key",
    }
    (folder / "campuses.yaml").write_text(yaml.safe_dump(content))
    return load(folder / "campuses.yaml")
