"""Whatever clients and a source may do to the rows of two stores, drawn from a seed."""

import collections
import contextlib
import datetime
import random

import psycopg

from pipelines.conflicts import noted, resolve
from schemas.batches import Lane, Op
from schemas.entities import TABLES
from schemas.errors import ConfigError
from schemas.positions import SEQ_END, START, Position
from schemas.siblings import Stamp
from schemas.tables import Kind
from tests.canonical import rows_of
from tests.deliveries import batch_of, resealed
from tests.edited_stores import HOUR_US, PLAN, RULES, EditedStore
from transforms.conflicts.tombstones import forget, may_forget
from transforms.deliver.edits.hold_records import Records
from transforms.deliver.edits.record_keys import Key
from transforms.deliver.store import Store

IDS = ("1", "2", "3", "a'b", "编号\u3000x", '%s "q" \\ {0}')
# None is near the bound of 300 s from another, or from a source's: both ways must judge alike.
_SKEWS_US = (0, 60_000_000, 100_000_000, HOUR_US, -HOUR_US, 1_500_000_000)
_TEXTS = (
    "x", "y", "诊 断\t\"'\\", " A ", "", "é", "e\u0301", "é\x7f\x01", "%{1}%s$1", "null", "0012",
    "1e5", "{\"a\": 1}", "\u2028\u0085\ufeff", "😀\U0002070e", "z" * 9_000, "\\u0041\\x41", None,
)  # fmt: skip
_LISTS = (
    "A", "A,B", "B,A", "A，B；C", "A;;B,", ",", "；", "A\n\tB", "A\u3000；\xa0B", " A ,A", "无",
    "无，A", "none", "NKDA;A", "青霉素；花粉", "a\u200b", "A\\,B", "'", None, "",
)  # fmt: skip
_TIMES = (
    "2026-11-23 08:00:00.123456+08", "2026-11-23 08:00+08", "0099-01-01", "0044-03-15 BC",
    "infinity", "-infinity", "12026-01-01 00:00+00", "9999-12-31 23:59:59.999999+00",
    "0001-01-01 00:00+00", "1969-12-31 23:59:59.9999995+00", None,
)  # fmt: skip
_STATES = ("requested", "arrived", "answered", "signed_off", "archived", "draft", "other", None)
_COLUMNS = {
    PLAN: {"title": _TEXTS, "content": _TEXTS, "status": _STATES, "participants": _LISTS,
           "follow_up": _TEXTS, "written_at": _TIMES, "updated_at": _TIMES},
    "patient": {"phone": _TEXTS, "allergies": _LISTS},
    "emr_document": {"title": _TEXTS, "content": _TEXTS, "status": _STATES, "updated_at": _TIMES},
    "consultation": {"opinion": _TEXTS, "purpose": _TEXTS, "consultant": _LISTS,
                     "status": _STATES, "requested_at": _TIMES, "arrived_at": _TIMES,
                     "updated_at": _TIMES},
}  # fmt: skip
_SOURCED = ("patient", "emr_document", "consultation")
_REFUSED = (psycopg.errors.RaiseException, psycopg.errors.UniqueViolation)
EDITED = tuple(_COLUMNS)


class OddEdits:
    """What happens at two stores, one step after another; `met` counts what did."""

    def __init__(self, seed: int, stores: list[EditedStore]):
        self.rng = random.Random(seed)
        self.stores = stores
        self.met: collections.Counter = collections.Counter()
        self.others = {s.name: psycopg.connect(s.dsn, autocommit=True) for s in stores}
        self._links = {
            s.name: Store(s.dsn, f"main>{s.name}", "main", None, lambda: 0) for s in stores
        }
        self._log: list[tuple[str, dict]] = []
        self._delivered = dict.fromkeys(self._links, 0)
        self._there: dict[tuple[str, str], bool] = {}

    def close(self) -> None:
        for one in (*self.others.values(), *self._links.values()):
            one.close()

    def step(self) -> None:
        """Something happens somewhere: mostly, a client edits."""
        store = self.rng.choice(self.stores)
        kinds = (self._edit, self._say, self._deliver, self._skew, self._restart, self._decide,
                 self._forget)  # fmt: skip
        kind = self.rng.choices(kinds, (60, 8, 6, 2, 2, 4, 2))[0]
        kind(store)

    def hold(self) -> contextlib.ExitStack:
        """A client that has changed a row, maybe, and does not commit until the end."""
        held = contextlib.ExitStack()
        store = self.rng.choice(self.stores)
        if self.rng.random() < 0.3:
            conn = self.others[store.name]
            held.enter_context(conn.transaction())
            with contextlib.suppress(*_REFUSED), conn.transaction():
                table = self.rng.choice(EDITED)
                self._update(conn, table, self.rng.choice(IDS), "main")
                self.met["held"] += 1
        return held

    # A client.

    def _edit(self, store: EditedStore) -> None:
        conn = self.rng.choice([store.client, self.others[store.name]])
        settings = {
            "editor": f"D{self.rng.randint(1, 4)} '\"\\ 医",
            "role": self.rng.choice(["superior", "attending", "consultant", "trainee", ""]),
            "lane": self.rng.choice(["routine", "routine", "emergency", ""]),
            "reason": self.rng.choice(_TEXTS) or "",
        }
        said = ", ".join(f"set_config('campus_sync.{name}', %s, false)" for name in settings)
        conn.execute(f"SELECT {said}", list(settings.values()))
        with conn.transaction(force_rollback=self.rng.random() < 0.05):
            for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
                # A savepoint: what is refused leaves the others.
                with contextlib.suppress(*_REFUSED), conn.transaction():
                    self._statement(conn)
                    self.met["statement"] += 1

    def _statement(self, conn: psycopg.Connection) -> None:
        table, record_id = self.rng.choice(EDITED), self.rng.choice(IDS)
        campus = self.rng.choice(["main", "main", "main", "east"])
        there = conn.execute(
            f"SELECT deleted FROM consult.{table} WHERE (record_id, campus) = (%s, %s)",
            (record_id, campus),
        ).fetchone()
        if there is None:
            values = {"patient_id": "P", **self._values(table, 3)}
            names = ", ".join(["campus", "record_id", *values])
            places = ", ".join(["%s"] * (len(values) + 2))
            conn.execute(
                f"INSERT INTO consult.{table} ({names}) VALUES ({places})",
                (campus, record_id, *values.values()),
            )
        elif self.rng.random() < 0.12:
            how = self.rng.choice([f"DELETE FROM consult.{table}",
                                   f"UPDATE consult.{table} SET deleted = true"])  # fmt: skip
            conn.execute(f"{how} WHERE (record_id, campus) = (%s, %s)", (record_id, campus))
            self.met["deletion"] += 1
        else:
            self._update(conn, table, record_id, campus)

    def _update(self, conn: psycopg.Connection, table: str, record_id: str, campus: str) -> None:
        values = self._values(table, 2)
        sets = ", ".join(f"{name} = %s" for name in values)
        conn.execute(
            f"UPDATE consult.{table} SET {sets} WHERE (record_id, campus) = (%s, %s)",
            (*values.values(), record_id, campus),
        )

    def _values(self, table: str, most: int) -> dict[str, str | None]:
        columns = _COLUMNS[table]
        names = self.rng.sample(list(columns), self.rng.randint(1, min(most, len(columns))))
        return {name: self.rng.choice(columns[name]) for name in names}

    # The campus's own system, which each store has met up to somewhere.

    def _say(self, _: EditedStore) -> None:
        table, record_id = self.rng.choice(_SOURCED), self.rng.choice(IDS[:4])
        there = self._there.get((table, record_id), False)
        gone = there and self.rng.random() < 0.2
        self._there[table, record_id] = not gone
        row: dict = {"record_id": record_id, "_src_table": f"his.{table}", "_seq": 1}
        row["_op"] = Op.DELETE if gone else Op.UPDATE if there else Op.INSERT
        row["_lsn"] = 10 * (len(self._log) + 1)
        now_us = int(datetime.datetime.now(datetime.UTC).timestamp() * 1e6)
        row["_commit_us"] = now_us + self.rng.choice([0, -HOUR_US, 800_000_000, -1_000])
        for column in () if gone else TABLES[table].columns:
            if column.kind is Kind.TEXT:
                row[column.name] = self.rng.choice((*_TEXTS, *_LISTS, "arrived", "archived"))
            elif column.kind is Kind.TIME:
                at = datetime.datetime(2026, 3, 1, 8, self.rng.randint(0, 3), tzinfo=datetime.UTC)
                row[column.name] = self.rng.choice([at, None])
            elif column.kind is Kind.DATE:
                row[column.name] = datetime.date(1990, 2, self.rng.randint(1, 2))
        if not gone:
            row["patient_id"] = "P"
        self._log.append((table, row))

    def _deliver(self, store: EditedStore) -> None:
        first = self._delivered[store.name]
        upto = min(len(self._log), first + self.rng.randint(1, 4))
        if upto == first:
            return
        tables: dict[str, list[dict]] = collections.defaultdict(list)
        for table, row in self._log[first:upto]:
            tables[table].append(row)
        begin = START if first == 0 else Position(10 * first, SEQ_END)
        batch = batch_of({name: rows_of(name, rows) for name, rows in tables.items()}, begin)
        batch = resealed(batch, link=f"main>{store.name}")
        receipt = self._links[store.name].apply([batch], Lane.ROUTINE)
        assert receipt.applied and receipt.counts.balanced
        self._delivered[store.name] = upto
        self.met["delivery"] += 1

    # What else happens to a store.

    def _skew(self, store: EditedStore) -> None:
        skew = self.rng.choice(_SKEWS_US)
        store.own.execute("UPDATE sync.store SET clock_offset_us = %s", (skew,))
        self.met["clock"] += 1

    def _restart(self, store: EditedStore) -> None:
        store.own.execute("UPDATE sync.store SET salt = salt + 1")
        self.met["restart"] += 1

    def _decide(self, store: EditedStore) -> None:
        asked = noted(store.own)
        if not asked:
            return
        one = self.rng.choice(asked)
        self.met["conflict open"] += 1
        columns = _COLUMNS.get(one.key.table, {})
        given = {} if self.rng.random() < 0.7 else {
            name: value for name in self.rng.sample(list(columns), 1)
            if (value := self.rng.choice(columns[name])) is not None
        }  # fmt: skip
        if one.group == "row":
            given = {"deleted": self.rng.choice(["true", "false"])}
        choose = None if given else self.rng.randint(1, 2)
        with contextlib.suppress(ConfigError):
            resolve(store.own, one, RULES, ("D9", "superior", "why"), choose, given)
            self.met["decision"] += 1

    def _forget(self, store: EditedStore) -> None:
        """What is deleted and known to be at the other store, whatever its age."""
        (other,) = (s for s in self.stores if s is not store)
        keys = [
            Key(*row)
            for row in store.own.execute(
                "SELECT table_name, campus, record_id FROM sync.record WHERE record IS NOT NULL"
            )
        ]
        known = Records(other.own, RULES)

        def step(key: Key, record):
            policy = RULES.tables[key.table]
            seen = {other.name: known.read(key).seen}
            if not may_forget(record, policy, RULES, seen, 1 << 61):
                return record
            stamp, actor, distrusted = store.own.execute(
                "SELECT sync.tick(), name || '.' || sync.incarnation(), distrusted FROM sync.store"
            ).fetchone()
            self.met["forgotten"] += 1
            trusted = tuple(sorted(distrusted))
            return forget(record, actor, Stamp(stamp, Lane.ROUTINE, "", "s", False, "", trusted))

        Records(store.own, RULES).update(keys, step)
