"""Tables of a source change while its link reads: what is additive passes, the rest holds itself.

Each case changes `drifting`, writes to it and to `steady`, and starts the link again.
"""

import psycopg
import pytest

from runners.cli import main
from runners.embedded.mariadb import MariaDbServer
from runners.embedded.postgres import PostgresServer
from runners.preflight import Finding, Severity, check
from tests.faults.harness import Link, until
from tests.one_link import OneLink

pytest_plugins = ["tests.fixtures_mariadb"]

TABLE = """\
  {schema}.{name}:
    table: allergy
    id: allergy_id
    id_prefix: {name}-
    columns:
      patient_id: mrn
      substance: allergen
      recorded_at: {{from: noted_on, formats: ['%Y-%m-%d']}}
    absent: [reaction, severity, verification, recorded_by, updated_at]
"""
CREATE = """\
CREATE TABLE {} (allergy_id int PRIMARY KEY, mrn varchar(20) NOT NULL, allergen varchar(20),
    noted_on date)"""
INSERT = "INSERT INTO drifting VALUES (2, 'P', 'S', '2026-01-02')"
MARIADB, POSTGRESQL = "mariadb", "postgresql"

PASSES = {
    "new column": ("ALTER TABLE drifting ADD COLUMN extra varchar(9)", f"{INSERT[:-1]}, 'x')"),
    "new column with a default": (
        "ALTER TABLE drifting ADD COLUMN extra varchar(9) NOT NULL DEFAULT 'x'",
        f"{INSERT[:-1]}, 'x')",
    ),
    "not null dropped": (
        {
            POSTGRESQL: "ALTER TABLE drifting ALTER COLUMN mrn DROP NOT NULL",
            MARIADB: "ALTER TABLE drifting MODIFY mrn varchar(20) NULL",
        },
        INSERT.replace("'P'", "NULL"),
    ),
    "widened text": (
        {
            POSTGRESQL: "ALTER TABLE drifting ALTER COLUMN allergen TYPE text",
            MARIADB: "ALTER TABLE drifting MODIFY allergen text",
        },
        INSERT,
    ),
    "widened key": (
        {
            POSTGRESQL: "ALTER TABLE drifting ALTER COLUMN allergy_id TYPE bigint",
            MARIADB: "ALTER TABLE drifting MODIFY allergy_id bigint",
        },
        INSERT,
    ),
    "new table": (CREATE.format("another"), INSERT),
}
# What is done, what is written, the reason, what is proposed, and what mends the mapping.
HOLDS = {
    "renamed": (
        "ALTER TABLE drifting RENAME COLUMN allergen TO allergen_name",
        INSERT,
        "missing_column",
        "columns: substance: allergen_name",
        ("substance: allergen", "substance: allergen_name"),
    ),
    "dropped": (
        "ALTER TABLE drifting DROP COLUMN allergen",
        "INSERT INTO drifting VALUES (2, 'P', '2026-01-02')",
        "missing_column",
        "absent: [reaction, severity, verification, recorded_by, updated_at, substance]",
        ("      substance: allergen\n", ""),
    ),
    "incompatible": (
        {
            POSTGRESQL: "ALTER TABLE drifting ALTER COLUMN noted_on TYPE varchar(20)",
            MARIADB: "ALTER TABLE drifting MODIFY noted_on varchar(20)",
        },
        INSERT.replace("2026-01-02", "02.01.2026"),
        "bad_time",
        "",
        ("formats: [", "formats: ['%d.%m.%Y', "),
    ),
    "key renamed": (
        "ALTER TABLE drifting RENAME COLUMN allergy_id TO allergy_no",
        INSERT,
        "missing_column",
        "id: allergy_no",
        ("id: allergy_id", "id: allergy_no"),
    ),
}
GOES = {
    "table renamed": "ALTER TABLE drifting RENAME TO drifted",
    "table dropped": "DROP TABLE drifting",
}


class Drift:
    """A campus of two tables, its store, and the link between them."""

    def __init__(self, kind: str, schema: str, connect, source: dict, folder, store: str):
        self.kind, self.schema, self._connect = kind, schema, connect
        self.tables = {"drifting": TABLE.format(schema=schema, name="drifting")}
        self.tables["steady"] = TABLE.format(schema=schema, name="steady")
        for name in self.tables:
            self.execute(CREATE.format(name))
            self.execute(f"INSERT INTO {name} VALUES (1, 'P', 'S', '2026-01-01')")
        text = "version: 1\nzone: +08:00\ntables:\n" + "".join(self.tables.values())
        self.one = OneLink(folder, store, "main", source, {"drift.yaml": text})
        self._next = 10

    def execute(self, *statements: str) -> None:
        with self._connect() as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            connection.commit()

    def say(self, statement: str | dict[str, str]) -> str:
        return statement if isinstance(statement, str) else statement[self.kind]

    def arrives(self, record_id: str, deleted: bool = False) -> None:
        query = f"SELECT deleted FROM consult.allergy WHERE record_id = '{record_id}'"
        until(lambda: self.one.ask(query) == [(deleted,)], 60, lambda: f"{record_id}: {self.known}")

    def flows(self) -> None:
        """The other table's rows go on arriving."""
        self._next += 1
        self.execute(f"INSERT INTO steady VALUES ({self._next}, 'P', 'S', '2026-01-01')")
        self.arrives(f"steady-{self._next}")

    @property
    def known(self) -> dict:
        return {
            "letters": self.one.ask("SELECT src_table, reason, column_name FROM sync.dead_letter"),
            "incidents": self.one.ask("SELECT kind, detail, state FROM sync.incident"),
            "snapshots": self.one.ask("SELECT reason, state FROM sync.snapshot"),
        }

    def incidents(self, state: str) -> list[str]:
        query = (
            f"SELECT detail FROM sync.incident WHERE kind = 'schema_drift' AND state = '{state}'"
        )
        return [detail for (detail,) in self.one.ask(query)]

    @property
    def config(self) -> str:
        return str(self.one.folder / "campuses.yaml")

    def remap(self, old: str, new: str) -> None:
        """Changes what the mapping says of `drifting`."""
        path = self.one.folder / "drift.yaml"
        part = self.tables["drifting"]
        assert old in part
        changed = part.replace(old, new)
        if "substance" not in changed:
            changed = changed.replace("updated_at]", "updated_at, substance]")
        path.write_text(path.read_text().replace(part, changed))

    def reread(self) -> int:
        table = f"{self.schema}.drifting"
        return main(["reread", "main", "--config", self.config, "--table", table])

    def letters(self) -> list[tuple]:
        return self.one.ask(
            "SELECT DISTINCT reason FROM sync.dead_letter WHERE src_table LIKE '%drifting'"
            " AND state = 'open'"
        )

    def findings(self) -> list[Finding]:
        return [one for one in check(self.one.config) if "drifting" in one.what]


@pytest.fixture(scope="module")
def mariadb_server(tmp_path_factory):
    with MariaDbServer(tmp_path_factory.mktemp("mariadb") / "server", durable=False) as server:
        yield server


@pytest.fixture
def drift(request, monkeypatch, tmp_path, database):
    monkeypatch.setattr("transforms.capture.link_reader._LOOK_AT_PUBLICATION_S", 0.5)
    kind = request.param
    if kind == POSTGRESQL:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        dsn = server.create_database(f"drift_{abs(hash(request.node.name)) % 10**9}")
        source = {"kind": kind, "dsn": dsn, "mapping": "drift.yaml"}
        made = Drift(kind, "public", lambda: psycopg.connect(dsn), source, tmp_path, database)
        made.execute("CREATE PUBLICATION campus_sync FOR TABLE drifting, steady")
        yield made
        made.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                     " WHERE database = current_database() AND NOT active")  # fmt: skip
        return
    server = request.getfixturevalue("mariadb_server")
    name = f"d{abs(hash(request.node.name)) % 10**9}"
    server.create_database(name)
    source = {"kind": kind, "dsn": server.dsn(name), "mapping": "drift.yaml"}
    yield Drift(kind, name, lambda: server.connect(name), source, tmp_path, database)


both = pytest.mark.parametrize("drift", [POSTGRESQL, MARIADB], indirect=True)


@both
@pytest.mark.parametrize("case", PASSES)
def test_what_is_additive_passes(drift, case):
    statement, insert = PASSES[case]
    with Link(drift.one.settings):
        drift.arrives("drifting-1")
        drift.execute(drift.say(statement), insert)
        drift.arrives("drifting-2")
        drift.flows()
    with Link(drift.one.settings):
        drift.flows()
    assert not drift.letters() and not [f for f in drift.findings() if f.severity == "error"]


@both
@pytest.mark.parametrize("case", HOLDS)
def test_what_is_incompatible_holds_only_its_table(drift, case, capsys):
    """It is told with the mapping's change; once that is made, a replay brings what was held."""
    statement, insert, reason, proposed, mended = HOLDS[case]
    with Link(drift.one.settings):
        drift.arrives("drifting-1")
        drift.execute(drift.say(statement), insert)
        drift.flows()
        until(drift.letters, 20, lambda: str(drift.known))
        if proposed:
            until(lambda: drift.incidents("open"), 20, lambda: str(drift.known))
        drift.flows()
    with Link(drift.one.settings):
        drift.flows()
        assert drift.letters() == [(reason,)]
        if proposed:
            (detail,) = drift.incidents("open")
            assert proposed in detail and "steady" not in detail
            (found,) = [one for one in drift.findings() if one.severity is Severity.HELD]
            assert "missing column" in found.what and proposed in found.remedy
            assert main(["check", "--config", drift.config]) == 1
            main(["status", "--once", "--config", drift.config])
            assert "held, the others flow" in capsys.readouterr().out
    drift.remap(*mended)
    with Link(drift.one.settings):
        assert main(["dead-letters", "replay", "--config", drift.config]) == 0
        drift.arrives("drifting-2")
        drift.flows()
        until(lambda: not drift.incidents("open"), 20, lambda: str(drift.known))
        drift.execute(drift.say(insert).replace("(2,", "(3,"))
        drift.arrives("drifting-3")
        assert drift.reread() == 0
    assert not drift.letters() and drift.known["snapshots"] == [("first", "done")]


@both
@pytest.mark.parametrize("case", GOES)
def test_a_table_that_goes_holds_no_other_and_is_read_whole_when_it_is_back(drift, case):
    with Link(drift.one.settings):
        drift.arrives("drifting-1")
        drift.execute(GOES[case])
        drift.flows()
        until(lambda: drift.incidents("open"), 20, lambda: str(drift.known))
        drift.flows()
    with Link(drift.one.settings):
        drift.flows()
        (detail,) = drift.incidents("open")
        assert "drifting is not there" in detail
        assert [one.severity for one in drift.findings()] == [Severity.HELD]
        # What is written meanwhile is in no log under this name.
        if case == "table renamed":
            drift.execute("INSERT INTO drifted VALUES (2, 'P', 'S', '2026-01-02')")
            drift.execute("ALTER TABLE drifted RENAME TO drifting")
        else:
            drift.execute(CREATE.format("drifting"), INSERT)
        drift.arrives("drifting-2")
        drift.arrives("drifting-1", deleted=case == "table dropped")
        until(lambda: not drift.incidents("open"), 20, lambda: str(drift.known))
        drift.flows()


@pytest.mark.parametrize("drift", [POSTGRESQL], indirect=True)
def test_a_table_whose_rows_the_log_does_not_name_holds_no_other(drift):
    with Link(drift.one.settings):
        drift.arrives("drifting-1")
        drift.execute("ALTER TABLE drifting DROP CONSTRAINT drifting_pkey", INSERT)
        drift.flows()
        until(lambda: drift.incidents("open"), 20, lambda: str(drift.known))
        drift.flows()
    with Link(drift.one.settings):
        drift.flows()
        (detail,) = drift.incidents("open")
        assert "replica identity lacks allergy_id" in detail and "steady" not in detail
        assert drift.one.ask("SELECT FROM consult.allergy WHERE record_id = 'drifting-2'") == []
        drift.execute("ALTER TABLE drifting ADD PRIMARY KEY (allergy_id)")
        drift.arrives("drifting-2")
        until(lambda: not drift.incidents("open"), 20, lambda: str(drift.known))
        drift.flows()
    assert not drift.letters()


@pytest.mark.parametrize("drift", [POSTGRESQL], indirect=True)
def test_rows_under_a_new_name_are_refused_and_not_passed_over(drift, monkeypatch):
    monkeypatch.setattr("transforms.capture.link_reader._LOOK_AT_PUBLICATION_S", 3600)
    with Link(drift.one.settings):
        drift.arrives("drifting-1")
        drift.execute("INSERT INTO drifting VALUES (3, 'P', 'S', '2026-01-01')")
        drift.arrives("drifting-3")
        drift.execute("ALTER TABLE drifting RENAME TO drifted", INSERT.replace("ing", "ed"))
        drift.flows()
        assert drift.one.ask("SELECT src_table, reason FROM sync.dead_letter") == [
            ("public.drifted", "unknown_table")
        ]
