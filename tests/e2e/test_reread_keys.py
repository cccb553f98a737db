"""Rows read again by keys of every type that has an order, at both kinds of database."""

import json
import typing

import psycopg
import pytest

from runners.cli import main
from runners.embedded.mariadb import MariaDbServer
from runners.embedded.postgres import PostgresServer
from tests.e2e.test_mariadb_link import CAMPUS_B, PATIENT, RESULT, Campus
from tests.faults.harness import Link, drop_slots, until
from tests.one_link import OneLink

pytest_plugins = ["tests.fixtures_mariadb"]

MAPPING = """\
version: 1
zone: +08:00
tables:
  {table}:
    table: allergy
    id: [{ids}]
    id_prefix: "{prefix}"
    columns: {{patient_id: p, substance: s}}
    absent: [reaction, severity, verification, recorded_by, recorded_at, updated_at]
"""


class Case(typing.NamedTuple):
    columns: str
    ids: str
    keys: list[str]
    low: str
    high: str
    prefix: str = ""


UUIDS = [f"{i:08x}-0000-4000-8000-0000000000ff" for i in range(9)]
DATES = [f"2026-0{i}-28" for i in range(1, 10)]
PAIRS = [f"{k}|{n}" for k in ("r1", "r3", "r2") for n in (9, 10, 11)]
TEXTS = ["a", "B", "c'", "d|e", "张三", "f\\", "g h", 'h"', "%s", "z"]
POSTGRESQL = {
    "text": Case("k text", "k", TEXTS, "c'", "h", "al-"),
    "C": Case('k varchar(9) COLLATE "C"', "k", TEXTS, "c'", "h"),
    "uuid": Case("k uuid", "k", UUIDS, UUIDS[2].upper(), UUIDS[6]),
    "date": Case("k date", "k", DATES, "2026-03-01", "2026-07-28"),
    "numeric": Case("k numeric", "k", ["-3", "1.50", "2", "10", "100.0", "7", "8"], "2.0", "10"),
    "pair": Case("k varchar(20), n int", "k, n", PAIRS, "r1|10", "r2|10"),
    "timestamp": Case("k timestamp", "k", [f"{d} 08:30:05" for d in DATES], DATES[2], DATES[6]),
}
MARIADB = {
    "text": Case("k varchar(20) CHARACTER SET gbk", "k", [*TEXTS[:-2], "z"], "C'", "H"),
    "date": POSTGRESQL["date"],
    "decimal": Case("k decimal(9,2)", "k", ["-3.00", "1.50", "2.00", "10.00", "7.00"], "2", "10"),
    "pair": POSTGRESQL["pair"],
    "unsigned": Case("k bigint unsigned", "k", [str(2**64 - i) for i in range(1, 9)],
                     str(2**64 - 6), str(2**64 - 3)),
}  # fmt: skip


class Allergies:
    """One source with one table, its store, and the link between them."""

    def __init__(self, case: Case, connect, folder, store: str, source: dict, table: str):
        self.case, self._connect, self.table = case, connect, table
        self.columns = case.ids.split(", ")
        mapping = MAPPING.format(table=table, ids=case.ids, prefix=case.prefix)
        self.execute(
            f"CREATE TABLE {table} ({case.columns}, p varchar(20), s varchar(20),"
            f" PRIMARY KEY ({case.ids}))"
        )
        source = source | {"mapping": "allergies.yaml"}
        self.one = OneLink(folder, store, "main", source, {"allergies.yaml": mapping})

    def execute(self, statement: str, *values) -> list[tuple]:
        with self._connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            rows = list(cursor.fetchall()) if cursor.description else []
            connection.commit()
        return rows

    def parts(self, key: str) -> list[str]:
        return key.split("|") if len(self.columns) > 1 else [key]

    def insert(self, keys: list[str]) -> None:
        marks = ", ".join(["%s"] * len(self.columns))
        for key in keys:
            self.execute(f"INSERT INTO {self.table} VALUES ({marks}, 'P', 'S')", *self.parts(key))

    def delete(self, key: str) -> None:
        same = " AND ".join(f"{name} = %s" for name in self.columns)
        self.execute(f"DELETE FROM {self.table} WHERE {same}", *self.parts(key))

    def within(self) -> list[str]:
        """The keys between the bounds, as the source's own order has it."""
        row = f"({self.case.ids})" if len(self.columns) > 1 else self.case.ids
        marks = ", ".join(["%s"] * len(self.columns))
        marks = f"({marks})" if len(self.columns) > 1 else marks
        found = self.execute(
            f"SELECT {self.case.ids} FROM {self.table} WHERE {row} >= {marks} AND {row} <= {marks}"
            f" ORDER BY {self.case.ids}",
            *self.parts(self.case.low),
            *self.parts(self.case.high),
        )
        return ["|".join(map(str, key)) for key in found]

    def settle(self, live: int) -> None:
        count = "SELECT count(*) FROM consult.allergy WHERE NOT deleted"
        until(lambda: self.one.ask(count) == [(live,)], 60, lambda: str(self.one.ask(count)))

    def state(self) -> dict[str, str]:
        head = len(self.case.prefix)
        rows = self.one.ask("SELECT record_id, patient_id, deleted FROM consult.allergy")
        return {key[head:]: "gone" if deleted else patient for key, patient, deleted in rows}

    def damage(self) -> None:
        with psycopg.connect(self.one.store) as store:
            store.execute("SET session_replication_role = replica")
            store.execute("UPDATE consult.allergy SET patient_id = 'wrong', deleted = false")

    def reread(self, *more: str) -> int:
        config = str(self.one.folder / "campuses.yaml")
        return main(["reread", "main", "--config", config, "--table", self.table, *more])

    def prove(self, capsys) -> None:
        """A range is mended, what lies outside it is left alone; then the whole table."""
        self.insert(self.case.keys)
        with Link(self.one.settings):
            self.settle(len(self.case.keys))
            within = self.within()
            assert 2 < len(within) < len(self.case.keys)
            outside = sorted({*map(str, self.state())} - {*within})
            for key in (within[1], outside[0]):
                self.delete(key)
            self.settle(len(self.case.keys) - 2)
            self.damage()
            bounds = ("--from", self.case.low, "--to", self.case.high)
            assert self.reread(*bounds, "--json") == 0
            told = json.loads(capsys.readouterr().out)
            assert (told["rows"], told["deleted"]) == (len(within) - 1, 1), told
            right = dict.fromkeys(within, "P") | {within[1]: "gone"}
            assert self.state() == dict.fromkeys(outside, "wrong") | right
            assert self.reread() == 0
            assert self.state() == dict.fromkeys(outside, "P") | right | {outside[0]: "gone"}
        law = "SELECT captured - delivered - duplicates - superseded FROM sync.progress"
        assert not any(rest for (rest,) in self.one.ask(law))


@pytest.fixture
def postgresql(request, postgres_server: PostgresServer, database, tmp_path):
    name = f"keys_{request.node.callspec.id.lower()}"
    dsn = postgres_server.create_database(name)
    made = Allergies(
        request.param,
        lambda: psycopg.connect(dsn),
        tmp_path,
        database,
        {"kind": "postgresql", "dsn": dsn},
        "public.allergies",
    )
    made.execute("CREATE PUBLICATION campus_sync FOR TABLE allergies")
    yield made
    with psycopg.connect(dsn, autocommit=True) as connection:
        drop_slots(connection)


@pytest.mark.parametrize(
    "postgresql", [pytest.param(case, id=name) for name, case in POSTGRESQL.items()], indirect=True
)
def test_keys_of_postgresql(postgresql, capsys):
    postgresql.prove(capsys)


@pytest.fixture(scope="module")
def mariadb(tmp_path_factory):
    with MariaDbServer(tmp_path_factory.mktemp("mariadb") / "server", durable=False) as server:
        yield server


@pytest.mark.parametrize("name", MARIADB)
def test_keys_of_mariadb(name, mariadb, database, tmp_path, capsys):
    mariadb.create_database(name)
    source = {"kind": "mariadb", "dsn": mariadb.dsn(name)}
    Allergies(
        MARIADB[name],
        lambda: mariadb.connect(name),
        tmp_path,
        database,
        source,
        f"{name}.allergies",
    ).prove(capsys)


REFUSED = {
    "padded": (Case("k char(9)", "k", ["a"], "a", "b"), (), "its key k is bpchar"),
    "no_value": (Case("k int", "k", ["1"], "", ""), ("--from", "one"), "one is no value of k"),
    "parts": (Case("k int, n int", "k, n", ["1|1"], "", ""), ("--from", "1"), "need 2 parts"),
    "day": (
        Case("k int", "k", ["1"], "", ""),
        ("--where-column", "s", "--since", "2026-01-01"),
        "no column s of a type that has days",
    ),
    "no_day": (
        Case("k int", "k", ["1"], "", ""),
        ("--where-column", "s", "--since", "yesterday"),
        "is no day",
    ),
    "alone": (Case("k int", "k", ["1"], "", ""), ("--since", "2026-01-01"), "belong together"),
}


@pytest.mark.parametrize(
    ("postgresql", "more", "told"),
    [pytest.param(*case, id=name) for name, case in REFUSED.items()],
    indirect=["postgresql"],
)
def test_what_cannot_be_told_is_refused_with_its_remedy(postgresql, more, told, capsys):
    postgresql.insert(postgresql.case.keys)
    with Link(postgresql.one.settings):
        postgresql.settle(1)
        assert postgresql.reread(*more) == 2
    errors = capsys.readouterr().err
    assert told in errors and "Remedy: " in errors


@pytest.mark.parametrize(
    "postgresql",
    [pytest.param(Case("k text, n int", "k, n", ["a|1", "c|1", "z|1"], "b|0", "d|0"), id="bar")],
    indirect=True,
)
def test_an_id_that_can_be_read_two_ways_is_looked_up_and_never_guessed(postgresql, capsys):
    with Link(postgresql.one.settings):
        postgresql.insert(postgresql.case.keys)
        for text in ("c|c", "c|d"):
            postgresql.execute(f"INSERT INTO allergies VALUES ('{text}', 5, 'P', 'S')")
        postgresql.settle(5)
        postgresql.execute("DELETE FROM allergies WHERE k = 'c|d'")
        postgresql.settle(4)
        postgresql.damage()
        bounds = ("--from", "b|0", "--to", "d|0")
        assert postgresql.reread(*bounds) == 1
        assert "1 records of the stores have ids that are no key" in capsys.readouterr().out
        state = postgresql.state()
        assert (state["c|c|5"], state["c|d|5"], state["a|1"]) == ("P", "wrong", "wrong")
        # Of the whole table there is nothing to guess.
        assert postgresql.reread() == 0
        assert postgresql.state()["c|d|5"] == "gone"


def test_rows_that_lean_on_a_parent_and_voided_ones_of_a_gbk_campus(
    make_mariadb, database, tmp_path, capsys
):
    server = make_mariadb()
    server.create_database("his")
    campus = Campus(server, database, tmp_path, "campus_b.yaml")
    campus.execute(*CAMPUS_B)
    campus.execute(PATIENT, rows=[(i, f"B{i}", f"张{i}", "男") for i in range(50)])
    campus.execute(RESULT, rows=[(i, i % 50, "6.8") for i in range(4000)])
    command = ["reread", "east", "--config", str(tmp_path / "campuses.yaml"), "--table"]
    with Link(campus.settings):
        campus.drain()
        campus.execute("UPDATE JYJG SET ZFPB = 1 WHERE JYXH = 30")
        campus.drain()
        with psycopg.connect(campus.store) as store:
            store.execute("SET session_replication_role = replica")
            store.execute("DELETE FROM consult.lab_result WHERE record_id::int BETWEEN 5 AND 1900")
            store.execute(
                "UPDATE consult.lab_result SET patient_id = NULL, deleted = false"
                " WHERE record_id::int > 3000 OR record_id = '30'"
            )
        assert main([*command, "his.JYJG", "--to", "3500", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["rows"], told["delivered"], told["deleted"]) == (3501, 1895 + 500, 0)
        unlike = "SELECT count(*) FROM consult.lab_result WHERE patient_id IS NULL"
        assert campus.ask(unlike) == [(499,)]
        assert main([*command, "his.JYJG"]) == 0
        assert campus.ask(unlike) == [(0,)]
        assert main([*command, "his.MS_BRDA"]) == 0
    assert campus.ask("SELECT count(*) FROM consult.lab_result WHERE NOT deleted") == [(3999,)]
