"""Dead letters on real PostgreSQL: each way to be refused, mended and replayed."""

import argparse
import base64
import json
import logging
import pathlib
import re
import threading
import time

import psycopg
import pytest
import yaml

from pipelines.compare import compare
from pipelines.replay import Became, letters, replay
from pipelines.sla_report import gather
from runners.cli import main, parser
from runners.dead_letters import dead_letters
from runners.embedded.traffic import Traffic
from schemas.batches import ChangeBatch, Lane, Op, RawChanges, Reject
from schemas.config import Config, load
from schemas.mappings import PACKAGED, load_mapping
from schemas.positions import SEQ_END, Position
from schemas.reports import comparison_to_json
from schemas.wire import seal
from tests.faults.harness import drop_slot
from tests.raw_changes import COMMIT_US, hospital_batch
from transforms.capture.interpret import Interpreter
from transforms.capture.link_reader import LinkReader
from transforms.capture.prepare import Preparer
from transforms.deliver import ledger
from transforms.deliver.store import Store
from transforms.escalations import Escalations
from transforms.seal_dead_letters import Sealer

NOW_US = 1_790_000_000_000_000
DEADLINE_S = 60
EMBEDDED = pathlib.Path(__file__).parents[2] / "runners" / "embedded"
SECRET = "秘密M4711"  # Stands in every refused row: no log and no list may have it.
LIMITS = {"heartbeat_s": 0.2, "gather_s": 0.02}


_SESSIONS = """\
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
    AND application_name = 'campus_sync' AND pid <> pg_backend_pid()"""


class Hospital:
    """One source, one store, and the link between them carried by reader and store alone."""

    def __init__(self, folder: pathlib.Path, source: str, store: str, mapping: dict | None = None):
        self.folder = folder
        (folder / "key").write_text(base64.b64encode(bytes(range(32))).decode())
        (folder / "key").chmod(0o600)
        self.path = folder / "campuses.yaml"
        self.content = {
            "version": 1,
            "sources": {
                "main": {"kind": "postgresql", "dsn": source, "mapping": "mapping.yaml"},
            },
            "stores": {"primary": {"dsn": store}},
            "dead_letter_key": "file:key",
            "limits": LIMITS,
        }
        self.path.write_text(yaml.safe_dump(self.content))
        self.map()
        self.source = psycopg.connect(source, autocommit=True)
        self.source.execute("CREATE ROLE sync LOGIN REPLICATION") if not self._has_role() else None
        for name in ("hospital.sql", "publish.sql"):
            self.source.execute((EMBEDDED / name).read_text())
        self.store = ledger.connect(store)
        self.reader: LinkReader | None = None
        self._applier: Store | None = None

    def _has_role(self) -> bool:
        return bool(self.source.execute("SELECT FROM pg_roles WHERE rolname = 'sync'").rowcount)

    @property
    def config(self) -> Config:
        return load(self.path)

    @property
    def link(self):
        return self.config.links()[0]

    def map(self, edit=None, base: str = "postgresql_his") -> None:
        """Writes the mapping file: the packaged one, edited."""
        content = yaml.load((PACKAGED / f"{base}.yaml").read_text(), yaml.BaseLoader)
        content["version"] = 1
        if edit is not None:
            edit(content)
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        # Plain words of a mapping are texts; only its numbers and nulls are not.
        text = re.sub(r"'(null|\d+(?:\.\d+)?)'(?=[,\n])", r"\1", text)
        (self.folder / "mapping.yaml").write_text(text)

    def start(self) -> None:
        settings = self.config.settings(self.link)
        sealer = Sealer(settings.key_ref)
        self._applier = Store(settings.store_dsn, self.link.name, "main", sealer, lambda: NOW_US)
        self.reader = LinkReader(settings)
        self.reader.start()

    def stop(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self._applier.close()
            self.reader = None
            deadline = time.monotonic() + DEADLINE_S
            while self.store.execute(_SESSIONS).fetchone()[0]:
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def carry(self) -> None:
        """Applies all that is committed now."""
        if self.reader is None:
            self.start()
        end = self.log_end()
        deadline = time.monotonic() + DEADLINE_S
        while self.reached() < end - 1:
            assert time.monotonic() < deadline, self.reached()
            self.apply(self.reader.next(0.1))

    def apply(self, batch: ChangeBatch | None) -> None:
        if batch is not None:
            self._applier.apply([batch], batch.lane)

    def log_end(self) -> int:
        (lsn,) = self.source.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
        return int(lsn)

    def reached(self) -> int:
        """What of the log is applied; nothing as long as a snapshot is under way."""
        running = "SELECT FROM sync.snapshot WHERE state = 'running'"
        if self.store.execute(running).rowcount:
            return 0
        row = self.store.execute("SELECT lsn FROM sync.progress WHERE lane = 'routine'").fetchone()
        return row[0] if row else 0

    def open(self) -> list[tuple[str, str, str]]:
        """Source table, reason and column of the open letters of the routine lane."""
        return self.store.execute(
            "SELECT src_table, reason, column_name FROM sync.dead_letter"
            " WHERE state = 'open' AND lane = 'routine' ORDER BY lsn, seq"
        ).fetchall()

    def counts(self, lane: Lane = Lane.ROUTINE) -> dict[str, int]:
        names = ("captured", "delivered", "duplicates", "superseded", "held", "dead")
        row = self.store.execute(
            f"SELECT {', '.join(names)} FROM sync.progress WHERE lane = %s", (lane,)
        ).fetchone()
        counts = dict(zip(names, row, strict=True))
        assert counts["captured"] == sum(row[1:]), "the law"
        (letters,) = self.store.execute(
            "SELECT count(*) FROM sync.dead_letter WHERE state = 'open' AND lane = %s", (lane,)
        ).fetchone()
        assert counts["dead"] == letters, "each dead change is an open letter"
        return counts

    def replay(self, *ids: str) -> list[tuple[Became, str]]:
        config = self.config
        filed, unreachable = letters(config)
        assert not unreachable
        wanted = [one for one in filed if one.letter.letter_id in ids] if ids else None
        results = list(replay(config, filed, wanted, lambda: NOW_US))
        return [(result.became, result.reason) for result in results]

    def stored(self, table: str, record_id: str, *columns: str) -> tuple | None:
        names = ", ".join(f'"{column}"' for column in columns)
        return self.store.execute(
            f"SELECT {names} FROM consult.{table} WHERE record_id = %s AND NOT deleted",
            (record_id,),
        ).fetchone()

    def assert_equal(self) -> None:
        """By content, and by every window of the manifest."""
        comparison = compare(self.config, settle_s=0)
        assert comparison.equal, comparison_to_json(comparison)
        assert not sum(match.refused for match in comparison.tables)
        windows = self.store.execute(
            "SELECT table_name, source_count, store_count FROM sync.manifest"
            " WHERE (source_count, source_digest) <> (store_count, store_digest)"
        )
        assert windows.fetchall() == []

    def drop_slot(self) -> None:
        """Drops the link's slot, once its reader has left."""
        drop_slot(self.config.sources["main"].dsn, self.link.slot, 60)

    def close(self) -> None:
        self.stop()
        self.drop_slot()
        self.source.close()
        self.store.close()


@pytest.fixture
def hospital(tmp_path, postgres_server, _database_numbers, caplog):
    caplog.set_level(logging.DEBUG)
    names = [f"letters_{next(_database_numbers)}" for _ in range(2)]
    made = Hospital(tmp_path, *map(postgres_server.create_database, names))
    yield made
    made.close()
    assert SECRET not in caplog.text
    assert "4711" not in caplog.text


def options(hospital: Hospital, *words: str) -> argparse.Namespace:
    return parser().parse_args(["dead-letters", *words, "--config", str(hospital.path)])


def table_of(mapping: dict, name: str) -> dict:
    return mapping["tables"][name]


# What a campus writes, why it is refused, and how its mapping is mended: (statement, source
# table, reason, column, mapping at first, mapping mended, canonical table, record id).

AT = "timestamptz '2026-01-01 08:00+08'"


def _nan_is_text(mapping: dict) -> None:
    measurement = table_of(mapping, "lis.result")["measurement"]
    del measurement["number"], measurement["text"]
    measurement["result"] = "val_num"
    table_of(mapping, "lis.result")["ignore"] = ["val_txt"]


def _null_when(table: str, column: str, source: str, text: str):
    def edit(mapping: dict) -> None:
        table_of(mapping, table)["columns"][column] = {"from": source, "nulls": [text]}

    return edit


def _diagnosis_type_in_list(mapping: dict) -> None:
    table_of(mapping, "his.diagnosis")["columns"]["is_primary"] = "dx_type"


def _days_from_frequency(mapping: dict) -> None:
    table_of(mapping, "his.prescription")["columns"]["days"] = "frequency"


def _short_texts(mapping: dict) -> None:
    mapping["max_text_bytes"] = 2000


def _more_columns(mapping: dict) -> None:
    table_of(mapping, "his.visit")["columns"]["bed"] = "bed_label"


UUID = "00000000-0000-4000-8000-000000004711"
BY_MAPPING = {
    "a number that is none": (
        f"INSERT INTO lis.result (result_id, mrn, loinc, val_num, updated_at) VALUES"
        f" ('{UUID}', '{SECRET}', '2823-3', 'NaN', {AT})",
        ("lis.result", "bad_decimal", "val_num"),
        None,
        _nan_is_text,
        ("lab_result", UUID),
    ),
    "a reference limit that is none": (
        f"INSERT INTO lis.result (result_id, mrn, loinc, val_num, ref_low, updated_at) VALUES"
        f" ('{UUID}', '{SECRET}', '2823-3', 4.1, 'NaN', {AT})",
        ("lis.result", "bad_decimal", "ref_low"),
        None,
        lambda mapping: table_of(mapping, "lis.result")["measurement"].pop("low"),
        ("lab_result", UUID),
    ),
    "a time without end": (
        f"INSERT INTO his.diagnosis (diagnosis_id, mrn, diagnosed_at, updated_at) VALUES"
        f" (4711, '{SECRET}', 'infinity', {AT})",
        ("his.diagnosis", "bad_time", "diagnosed_at"),
        None,
        _null_when("his.diagnosis", "diagnosed_at", "diagnosed_at", "infinity"),
        ("diagnosis", "4711"),
    ),
    "a date that no calendar here has": (
        f"INSERT INTO his.patient (pid, mrn, birth_date, updated_at) VALUES"
        f" (4711, '{SECRET}', '294000-01-01', {AT})",
        ("his.patient", "bad_date", "birth_date"),
        None,
        _null_when("his.patient", "birth_date", "birth_date", "294000-01-01"),
        ("patient", "4711"),
    ),
    "a truth value that is none": (
        f"INSERT INTO his.diagnosis (diagnosis_id, mrn, dx_type, updated_at) VALUES"
        f" (4711, '{SECRET}', '{SECRET[:8]}', {AT})",
        ("his.diagnosis", "bad_bool", "dx_type"),
        _diagnosis_type_in_list,
        None,
        ("diagnosis", "4711"),
    ),
    "a whole number that is none": (
        f"INSERT INTO his.prescription (rx_no, line_no, mrn, frequency, updated_at) VALUES"
        f" ('{SECRET}', 1, '{SECRET}', 'q8h', {AT})",
        ("his.prescription", "bad_int", "frequency"),
        _days_from_frequency,
        None,
        ("prescription", f"{SECRET}|1"),
    ),
    "a text longer than agreed": (
        f"INSERT INTO emr.document (doc_id, mrn, content, updated_at) VALUES"
        f" (4711, '{SECRET}', repeat('{SECRET}', 300), {AT})",
        ("emr.document", "oversized", "content"),
        _short_texts,
        None,
        ("emr_document", "4711"),
    ),
}
OTHERS = f"""\
INSERT INTO his.visit (visit_no, mrn, visit_class, triage_level, bed, updated_at)
VALUES ('V1', 'M1', 'AMB', 4, '7', {AT});
INSERT INTO his.medical_order (order_id, mrn, status, updated_at)
VALUES (1, 'M1', 'active', {AT})"""


@pytest.mark.parametrize("case", BY_MAPPING)
def test_what_the_mapping_refuses_is_replayed_once_it_is_mended(hospital, case):
    """The other rows of its transaction arrive at once; the letter waits, then arrives too."""
    statement, letter, at_first, mended, place = BY_MAPPING[case]
    hospital.map(at_first)
    hospital.carry()
    hospital.source.execute(f"BEGIN; {OTHERS}; {statement}; COMMIT")
    hospital.carry()
    assert hospital.open() == [letter]
    assert hospital.stored("visit", "V1", "bed") == ("7",)
    assert hospital.stored("medical_order", "1", "status") == ("active",)
    assert hospital.counts() | {"captured": 3, "delivered": 2, "dead": 1} == hospital.counts()
    # As long as nothing is mended, nothing changes.
    assert hospital.replay() == [(Became.REFUSED, letter[1])]
    assert hospital.open() == [letter]
    hospital.stop()
    hospital.map(mended)
    assert hospital.replay() == [(Became.DELIVERED, "")]
    assert hospital.stored(*place, "patient_id") == (SECRET,)
    assert hospital.counts() | {"delivered": 3, "dead": 0} == hospital.counts()
    assert hospital.replay() == []
    hospital.assert_equal()


def test_a_column_that_is_missing_and_comes_back(hospital):
    hospital.carry()
    hospital.source.execute("ALTER TABLE his.visit RENAME bed TO bed_label")
    hospital.source.execute(OTHERS.replace("bed", "bed_label"))
    hospital.carry()
    assert hospital.open() == [("his.visit", "missing_column", "bed")]
    assert hospital.replay() == [(Became.REFUSED, "missing_column")]
    hospital.map(_more_columns)
    assert hospital.replay() == [(Became.DELIVERED, "")]
    hospital.stop()
    hospital.carry()
    assert hospital.stored("visit", "V1", "bed") == ("7",)
    hospital.assert_equal()


def test_a_column_that_nobody_knows_passes(hospital):
    hospital.carry()
    hospital.source.execute(f"ALTER TABLE his.visit ADD wristband text DEFAULT 'x'; {OTHERS}")
    hospital.carry()
    assert hospital.open() == []
    hospital.assert_equal()


# What the store refuses.

BY_STORE = {
    "spo2_percent": (
        f"INSERT INTO his.vital_sign (vital_id, mrn, spo2, measured_at) VALUES"
        f" (4711, '{SECRET}', 250, {AT})",
        ("his.vital_sign", "check_violation", "spo2_percent"),
        ("vital_sign", "4711"),
    ),
    "triage_level": (
        f"INSERT INTO his.visit (visit_no, mrn, visit_class, triage_level, updated_at) VALUES"
        f" ('4711', '{SECRET}', 'AMB', 9, {AT})",
        ("his.visit", "check_violation", "triage_level"),
        ("visit", "4711"),
    ),
    "dose": (
        f"INSERT INTO his.prescription (rx_no, line_no, mrn, dose, updated_at) VALUES"
        f" ('4711', 2, '{SECRET}', -0.5, {AT})",
        ("his.prescription", "check_violation", "dose"),
        ("prescription", "4711|2"),
    ),
}


@pytest.mark.parametrize("column", BY_STORE)
def test_what_the_store_refuses_is_replayed_once_it_may_be_written(hospital, column):
    statement, letter, (table, record_id) = BY_STORE[column]
    hospital.carry()
    hospital.source.execute(f"BEGIN; {OTHERS}; {statement}; COMMIT")
    hospital.carry()
    assert hospital.open() == [letter]
    assert hospital.counts() | {"captured": 3, "delivered": 2, "dead": 1} == hospital.counts()
    assert hospital.replay() == [(Became.REFUSED, "check_violation")]
    hospital.store.execute(f"ALTER TABLE consult.{table} DROP CONSTRAINT {table}_{column}_range")
    assert hospital.replay() == [(Became.DELIVERED, "")]
    assert hospital.stored(table, record_id, "patient_id") == (SECRET,)
    assert hospital.counts() | {"delivered": 3, "dead": 0} == hospital.counts()
    assert hospital.replay() == []
    hospital.assert_equal()


def test_both_lanes_letters_of_one_change_are_settled(hospital):
    """An emergency copy is refused as its original is: two counts, two letters, one row."""
    hospital.carry()
    hospital.source.execute(
        "INSERT INTO his.vital_sign (vital_id, mrn, spo2, gcs, sbp, measured_at) VALUES"
        f" (4711, '{SECRET}', 250, 3, 40, now())"
    )
    hospital.carry()
    assert hospital.counts(Lane.EMERGENCY)["dead"] == hospital.counts()["dead"] == 1
    hospital.store.execute(
        "ALTER TABLE consult.vital_sign DROP CONSTRAINT vital_sign_spo2_percent_range"
    )
    assert sorted(hospital.replay()) == [(Became.DELIVERED, ""), (Became.DUPLICATE, "")]
    assert hospital.counts(Lane.EMERGENCY)["dead"] == hospital.counts()["dead"] == 0
    hospital.assert_equal()


def test_a_letter_that_passes_the_mapping_may_be_refused_by_the_store(hospital):
    """Then it stays open, sealed anew under its new reason."""
    hospital.carry()
    hospital.source.execute(
        f"INSERT INTO his.prescription (rx_no, line_no, mrn, dose, updated_at, prescribed_at)"
        f" VALUES ('4711', 2, '{SECRET}', -1, {AT}, 'infinity')"
    )
    hospital.carry()
    assert hospital.open() == [("his.prescription", "bad_time", "prescribed_at")]
    hospital.map(_null_when("his.prescription", "prescribed_at", "prescribed_at", "infinity"))
    assert hospital.replay() == [(Became.REFUSED, "check_violation")]
    assert hospital.open() == [("his.prescription", "check_violation", "dose")]
    hospital.store.execute(
        "ALTER TABLE consult.prescription DROP CONSTRAINT prescription_dose_range"
    )
    assert hospital.replay() == [(Became.DELIVERED, "")]
    hospital.assert_equal()


def test_texts_that_no_store_can_hold_wait_for_a_newer_change(hospital):
    """What a source of another kind may send: NUL, and bytes that are no text."""
    settings = hospital.config.settings(hospital.link)
    interpreter = Interpreter(settings, load_mapping(settings.mapping), Escalations())
    preparer = Preparer(settings)
    sealer = Sealer(settings.key_ref)
    store = Store(settings.store_dsn, "main>primary", "main", sealer, lambda: NOW_US)

    def carry(lsn: int, rows: list[dict], rejects=()) -> None:
        rows = [{"_lsn": lsn, "mrn": SECRET, **row} for row in rows]
        batch = hospital_batch("his.patient", rows)
        end, captured = Position(lsn, SEQ_END), len(rows) + len(rejects)
        raw = RawChanges(
            Position(lsn - 1, SEQ_END),
            end,
            captured,
            COMMIT_US,
            {"his.patient": batch},
            rejects=tuple(rejects),
        )
        begin = Position(lsn - 1, SEQ_END)
        stretch = interpreter.interpret(raw, begin)
        finished = seal(preparer.finish(preparer.routine(stretch, NOW_US)))
        assert store.apply([finished], Lane.ROUTINE).counts.captured == captured

    undecodable = Reject(
        src_table="his.patient",
        position=Position(1, 9),
        op=Op.INSERT,
        commit_us=COMMIT_US,
        reason="invalid_text",
        column="name",
        row={"pid": "3", "mrn": SECRET, "name": "\\xff", "_old.pid": None},
    )
    carry(1, [{"pid": "1", "name": "a\0b"}, {"pid": "2", "name": "good"}], [undecodable])
    refused = [("his.patient", "nul_byte", "name"), ("his.patient", "invalid_text", "name")]
    assert hospital.open() == refused
    assert hospital.stored("patient", "2", "name") == ("good",)
    assert [became for became, _ in hospital.replay()] == [Became.REFUSED] * 2
    assert hospital.open() == refused
    carry(2, [{"pid": pid, "name": "new", "_seq": int(pid)} for pid in "13"])
    store.close()
    assert [became for became, _ in hospital.replay()] == [Became.SUPERSEDED] * 2
    assert hospital.stored("patient", "3", "name") == ("new",)
    assert hospital.counts() | {"superseded": 2, "dead": 0} == hospital.counts()


# Order.


def test_a_newer_row_wins(hospital):
    """Whether or not the letter's change could be written by now."""
    hospital.carry()
    add = "INSERT INTO his.diagnosis (diagnosis_id, mrn, diagnosed_at, updated_at) VALUES"
    hospital.source.execute(f"{add} (1, '{SECRET}', 'infinity', {AT})")
    hospital.source.execute(f"{add} (2, '{SECRET}', 'infinity', {AT})")
    hospital.source.execute(f"{add} (3, '{SECRET}', 'infinity', {AT})")
    hospital.source.execute(f"UPDATE his.diagnosis SET diagnosed_at = {AT} WHERE diagnosis_id = 1")
    hospital.source.execute("DELETE FROM his.diagnosis WHERE diagnosis_id = 2")
    hospital.carry()
    assert len(hospital.open()) == 3
    assert sorted(hospital.replay()) == [
        (Became.REFUSED, "bad_time"),
        (Became.SUPERSEDED, ""),
        (Became.SUPERSEDED, ""),
    ]
    hospital.map(_null_when("his.diagnosis", "diagnosed_at", "diagnosed_at", "infinity"))
    hospital.source.execute(f"UPDATE his.diagnosis SET diagnosed_at = {AT} WHERE diagnosis_id = 3")
    hospital.carry()
    assert hospital.replay() == [(Became.SUPERSEDED, "")]
    assert hospital.stored("diagnosis", "2", "name") is None
    assert hospital.counts() | {"superseded": 3, "dead": 0} == hospital.counts()
    hospital.assert_equal()


def test_a_snapshot_that_came_later_has_the_last_word(hospital):
    """What was refused before a gap and deleted in it does not come back."""
    hospital.carry()
    add = "INSERT INTO his.diagnosis (diagnosis_id, mrn, diagnosed_at, updated_at) VALUES"
    hospital.source.execute(f"{add} (1, '{SECRET}', 'infinity', {AT})")
    hospital.carry()
    hospital.stop()
    hospital.source.execute("DELETE FROM his.diagnosis")
    hospital.drop_slot()
    hospital.carry()
    hospital.map(_null_when("his.diagnosis", "diagnosed_at", "diagnosed_at", "infinity"))
    assert hospital.replay() == [(Became.SUPERSEDED, "")]
    hospital.assert_equal()


def test_what_is_built_on_a_refused_change_waits_for_it(hospital):
    """Without the whole old row in the log: a later change may lean on an earlier letter."""
    hospital.source.execute("ALTER TABLE emr.document REPLICA IDENTITY DEFAULT")
    hospital.source.execute("ALTER TABLE emr.document ALTER content SET STORAGE EXTERNAL")
    hospital.carry()
    hospital.source.execute(
        "INSERT INTO emr.document (doc_id, mrn, content, written_at, updated_at) VALUES"
        f" (1, '{SECRET}', repeat('{SECRET}', 1000), 'infinity', {AT})"
    )
    hospital.source.execute(f"UPDATE emr.document SET status = 'signed', written_at = {AT}")
    hospital.carry()
    assert [reason for _, reason, _ in hospital.open()] == ["bad_time", "no_base_row"]
    assert [reason for _, reason in hospital.replay()] == ["bad_time", "no_base_row"]
    hospital.map(_null_when("emr.document", "written_at", "written_at", "infinity"))
    assert hospital.replay() == [(Became.DELIVERED, "")] * 2
    assert hospital.stored("emr_document", "1", "status", "content") == ("signed", SECRET * 1000)
    hospital.assert_equal()


def test_a_replay_beside_the_running_link_loses_and_doubles_nothing(hospital):
    """Changes of the same rows flow while their letters are replayed, over and over."""
    hospital.carry()
    hospital.store.execute("ALTER TABLE consult.visit ADD CONSTRAINT odd CHECK (bed <> 'bad')")
    for i in range(30):
        hospital.source.execute(
            "INSERT INTO his.visit (visit_no, mrn, bed, updated_at) VALUES (%s, %s, 'bad', now())",
            (f"V{i}", SECRET),
        )
    hospital.carry()
    assert len(hospital.open()) == 30
    stopping, results, failed = threading.Event(), [], []

    def again() -> None:
        try:
            while not stopping.is_set():
                results.extend(hospital.replay())
        except Exception as error:  # noqa: BLE001  Shown by the assertion below.
            failed.append(error)

    thread = threading.Thread(target=again)
    thread.start()
    hospital.store.execute("ALTER TABLE consult.visit DROP CONSTRAINT odd")
    for i in range(0, 30, 2):
        hospital.source.execute("UPDATE his.visit SET bed = 'good' WHERE visit_no = %s", (f"V{i}",))
        hospital.carry()
    stopping.set()
    thread.join()
    assert not failed
    hospital.replay()
    counts = hospital.counts()
    assert (counts["captured"], counts["dead"]) == (45, 0)
    assert sum(became is Became.DELIVERED for became, _ in results) >= 15
    hospital.assert_equal()


# The verb.


def refused_diagnoses(hospital: Hospital, count: int = 2) -> None:
    hospital.carry()
    for i in range(count):
        hospital.source.execute(
            "INSERT INTO his.diagnosis (diagnosis_id, mrn, diagnosed_at, updated_at) VALUES"
            f" ({i}, '{SECRET}', 'infinity', {AT})"
        )
    hospital.carry()
    hospital.stop()


def test_list_names_letters_and_never_content(hospital, capsys):
    refused_diagnoses(hospital)
    assert dead_letters(options(hospital, "list")) == 0
    shown = capsys.readouterr().out
    assert "2 open dead letters" in shown and SECRET not in shown
    assert dead_letters(options(hospital, "list", "--json")) == 0
    listed = capsys.readouterr().out
    assert SECRET not in listed
    plain = json.loads(listed)
    assert plain["reasons"] == {"bad_time": 2}
    first = plain["letters"][0]
    assert first["link"] == "main>primary" and first["state"] == "open"
    assert (first["table"], first["reason"]) == ("his.diagnosis", "bad_time")
    assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+#1", first["position"])
    (refused,) = gather(hospital.config, NOW_US).refused
    assert (refused.reason, refused.column, refused.open) == ("bad_time", "diagnosed_at", 2)


def test_show_tells_a_terminal_or_json_and_nobody_else(hospital, capsys, monkeypatch):
    refused_diagnoses(hospital)
    ids = [one.letter.letter_id for one in letters(hospital.config)[0]]
    words = ["dead-letters", "show", ids[0][:10], "--config", str(hospital.path)]
    assert main(words) == 2
    assert "no terminal" in capsys.readouterr().err
    assert main([*words, "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["id"], shown["row"]["mrn"]) == (ids[0], SECRET)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(words) == 0
    assert SECRET in capsys.readouterr().out
    assert main(["dead-letters", "show", "--config", str(hospital.path)]) == 2
    assert main(["dead-letters", "show", "zz", "--config", str(hospital.path)]) == 2
    assert "names no dead letter" in capsys.readouterr().err


def test_another_key_and_a_damaged_letter(hospital, capsys):
    refused_diagnoses(hospital)
    ids = [one.letter.letter_id for one in letters(hospital.config)[0]]
    hospital.store.execute(
        "UPDATE sync.dead_letter SET sealed = set_byte(sealed, 20, get_byte(sealed, 20) # 1)"
        " WHERE letter_id = %s",
        (ids[0],),
    )
    words = ["dead-letters", "show", "--json", "--config", str(hospital.path)]
    assert main([*words, *ids]) == 1
    out, err = capsys.readouterr()
    assert [one["id"] for one in json.loads(out)] == ids[1:]
    assert ids[0][:10] in err and "not as it was sealed" in err
    assert hospital.replay() == [(Became.DAMAGED, ""), (Became.REFUSED, "bad_time")]
    (hospital.folder / "key").write_text(base64.b64encode(bytes(32)).decode())
    assert main([*words, *ids]) == 2
    assert "needs key" in capsys.readouterr().err
    assert main(["dead-letters", "replay", "--config", str(hospital.path)]) == 1
    out, err = capsys.readouterr()
    assert "2  sealed with another key" in out and "needs key" in err
    assert len(hospital.open()) == 2


def test_replay_says_what_became_of_each(hospital, capsys):
    refused_diagnoses(hospital, 3)
    ids = [one.letter.letter_id for one in letters(hospital.config)[0]]
    assert dead_letters(options(hospital, "replay")) == 1
    assert "refused again" in capsys.readouterr().out
    hospital.map(_null_when("his.diagnosis", "diagnosed_at", "diagnosed_at", "infinity"))
    assert dead_letters(options(hospital, "replay", ids[0][:8])) == 0
    assert "1  delivered" in capsys.readouterr().out
    assert dead_letters(options(hospital, "replay", ids[0], "--json")) == 0
    assert json.loads(capsys.readouterr().out)["letters"][0]["became"] == "replayed before"
    assert dead_letters(options(hospital, "replay")) == 0
    assert "2  delivered" in capsys.readouterr().out
    assert dead_letters(options(hospital, "replay")) == 0
    assert "no dead letter" in capsys.readouterr().out


def test_a_store_that_is_down_is_named(hospital, capsys):
    hospital.content["stores"]["primary"]["dsn"] = "postgresql://sync@127.0.0.1:1/consult"
    hospital.path.write_text(yaml.safe_dump(hospital.content))
    assert dead_letters(options(hospital, "list")) == 1
    assert "store primary" in capsys.readouterr().err


def test_traffic_that_must_be_refused_is_listed_and_reported(hospital, capsys):
    hospital.carry()
    role = hospital.source.info.user
    with Traffic(hospital.config, writer=role) as traffic:
        wrong = traffic.wrong("main")
    hospital.carry()
    assert sorted(hospital.open()) == [
        ("his.diagnosis", "bad_time", "diagnosed_at"),
        ("his.patient", "bad_date", "birth_date"),
        ("his.visit", "check_violation", "triage_level"),
        ("his.vital_sign", "check_violation", "spo2_percent"),
        ("lis.result", "bad_decimal", "val_num"),
    ]
    assert len(wrong) == 5
    assert dead_letters(options(hospital, "list")) == 0
    shown = capsys.readouterr().out
    for reason in ("bad_time", "bad_date", "check_violation", "bad_decimal"):
        assert reason in shown
    report = gather(hospital.config, NOW_US)
    assert {(part.reason, part.column) for part in report.refused} >= {
        (reason, column) for _, reason, column in hospital.open()
    }
    assert report.law_holds
    assert compare(hospital.config, settle_s=0).equal
