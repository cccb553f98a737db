"""Quality and persons while the job runs: found by themselves, and nothing waits for them."""

import base64
import datetime
import time

import psycopg
import pytest
import yaml

from pipelines import empi
from pipelines.sla_report import Observer
from runners.upkeep import Judge, Rules, Upkeep
from schemas.batches import Lane
from schemas.config import load
from schemas.errors import ConfigError
from schemas.quality_rules import load_quality_rules
from tests.canonical import COMMIT_US, rows_of
from tests.deliveries import LINK, batch_of
from tests.population import id_no
from tests.quality_cases import NOW_US
from tests.store_rows import StoreRows
from transforms.deliver import store_schema
from transforms.deliver.judging import check_store
from transforms.deliver.store import Store

SOON_S = 30.0
BIRTH = datetime.date(1980, 2, 3)
ALARM = ("main", "vital_sign", "1", 1, "heart_rate_impossible")
ALARMS = "SELECT campus, table_name, record_id, rule, reason FROM sync.quality_alarm WHERE rule = 1"


@pytest.fixture
def stores(postgres_server, database):
    """The primary and a campus's own store, empty."""
    dsns = {"primary": database, "main": postgres_server.create_database(f"{database[-8:]}_own")}
    conns = {name: psycopg.connect(dsn, autocommit=True) for name, dsn in dsns.items()}
    for conn in conns.values():
        store_schema.ensure(conn)
    yield conns
    for conn in conns.values():
        conn.close()


@pytest.fixture
def campus_file(tmp_path, stores):
    """Returns what writes a configuration of the two stores; sources are not to be reached."""
    (tmp_path / "key").write_text(base64.b64encode(bytes(range(32))).decode())
    (tmp_path / "key").chmod(0o600)
    source = {"kind": "postgresql", "mapping": "postgresql_his"}

    def write(**more):
        content = {
            "version": 1,
            "sources": {
                c: source | {"dsn": f"postgresql://x@127.0.0.1:1/{c}"} for c in ("main", "east")
            },
            "stores": {name: {"dsn": conn.info.dsn} for name, conn in stores.items()},
            "dead_letter_key": "file:key",
            "quality_every_s": 0.05,
            "match_every_s": 0.05,
            **more,
        }
        path = tmp_path / "campuses.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def eventually(ask, wanted):
    """Waits until `ask()` is `wanted`."""
    until = time.monotonic() + SOON_S
    while (found := ask()) != wanted:
        assert time.monotonic() < until, f"{found} instead of {wanted}"
        time.sleep(0.05)


def settled_too(conn) -> list[tuple]:
    return conn.execute(
        "SELECT reason, settled_at IS NOT NULL FROM sync.quality_alarm WHERE rule = 1"
    ).fetchall()


def test_alarms_come_and_go_while_the_job_runs(stores, campus_file):
    rows = {name: StoreRows(conn, name) for name, conn in stores.items()}
    config = load(campus_file())
    with Upkeep(config, Rules.load(config)):
        for part in rows.values():
            part.put("vital_sign", "main", "1", pulse_per_min=0)
        for conn in stores.values():
            eventually(lambda conn=conn: conn.execute(ALARMS).fetchall(), [ALARM])
        for part in rows.values():
            part.put("vital_sign", "main", "1", pulse_per_min=70)
        for conn in stores.values():
            wanted = [("heart_rate_impossible", True)]
            eventually(lambda conn=conn: settled_too(conn), wanted)


def test_a_store_that_is_down_holds_up_no_other(stores, campus_file, caplog):
    config = load(campus_file(stores={
        "primary": {"dsn": stores["primary"].info.dsn},
        "main": {"dsn": "postgresql://sync@127.0.0.1:1/consult"},
    }))  # fmt: skip
    rows = StoreRows(stores["primary"])
    with Upkeep(config, Rules.load(config)):
        rows.put("vital_sign", "main", "1", pulse_per_min=0)
        eventually(lambda: stores["primary"].execute(ALARMS).fetchall(), [ALARM])
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if text.startswith("quality of store main: ")]


def test_a_store_that_is_filled_in_bulk_is_left_alone_for_a_minute(stores, campus_file):
    conn, now_s = stores["primary"], [0.0]
    config = load(campus_file())
    judge = Judge(config, "primary", load_quality_rules(), lambda: now_s[0])
    rows = StoreRows(conn)
    rows.reach("main", 1)

    def take_in(changes: int) -> None:
        conn.execute(
            "UPDATE sync.progress SET captured = captured + %(n)s, delivered = delivered + %(n)s"
            " WHERE link = 'main>primary'",
            {"n": changes},
        )

    assert judge() == ""
    rows.put("vital_sign", "main", "1", pulse_per_min=0)
    for now_s[0] in range(5, 60, 5):
        take_in(100_000)
        assert judge() == ""
        assert conn.execute(ALARMS).fetchall() == []
    now_s[0] = 61
    take_in(100_000)
    assert judge() == ""  # It has waited long enough.
    assert conn.execute(ALARMS).fetchall() == [ALARM]
    rows.put("vital_sign", "main", "1", pulse_per_min=70)
    now_s[0] = 66
    take_in(100)
    assert judge() == ""  # As ever, with little to take in.
    assert settled_too(conn) == [("heart_rate_impossible", True)]


def test_switched_off_is_off(stores, campus_file):
    config = load(campus_file(quality_rules="off", patient_matching=False))
    rules = Rules.load(config)
    assert (rules.quality, rules.matching) == (None, None)
    with Upkeep(config, rules):
        pass
    assert stores["primary"].execute("SELECT count(*) FROM sync.quality_progress").fetchone() == (
        0,
    )


def test_a_rule_file_with_a_mistake_is_refused_before_the_start(campus_file, tmp_path):
    (tmp_path / "mine.yaml").write_text("rules: []\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        Rules.load(load(campus_file(quality_rules="mine.yaml")))


def human(**changes) -> dict:
    row = {"name": "王小明", "sex": "1", "birth_date": BIRTH, "phone": "15400000001"}
    return row | {"id_no": id_no(BIRTH, "1")} | changes


def test_one_patients_records_come_together_in_every_store(stores, campus_file):
    """Of a patient whom two campuses know, each store's view lists all and names what lacks."""
    rows = {name: StoreRows(conn, name) for name, conn in stores.items()}
    config = load(campus_file())
    with Upkeep(config, Rules.load(config)):
        for part in rows.values():
            for campus, patient in (("main", "M1"), ("east", "E1")):
                part.put("patient", campus, f"r{patient}", patient_id=patient, **human())
            part.put("lab_result", "east", "L1", patient_id="E1", item_code="K", status="final")
        for conn in stores.values():
            ask = "SELECT campuses FROM consult.person"
            eventually(
                lambda conn=conn, ask=ask: conn.execute(ask).fetchall(), [(["east", "main"],)]
            )
            listed = conn.execute(
                "SELECT campus, entity, record_id FROM consult.person_record ORDER BY 1, 2, 3"
            ).fetchall()
            assert listed == [
                ("east", "lab_result", "L1"),
                ("east", "patient", "rE1"),
                ("main", "patient", "rM1"),
            ]
        for part in rows.values():
            part.put("allergy", "main", "A1", patient_id="M1", substance="青霉素")
        lacking, late = (
            stores["primary"]
            .execute("SELECT entities_lacking, campuses_late FROM consult.person")
            .fetchone()
        )
        assert "visit" in lacking and not {"patient", "lab_result", "allergy"} & set(lacking)
        assert late == ["east", "main"]  # Their watermarks are of a day long ago.
        # What a person decides at one store takes effect in all, by itself.
        pair = ("east", "E1", "main", "M1")
        assert empi.decide(config, "unlink", [pair], "dr", "two people", 1) == []
        for conn in stores.values():
            ask = "SELECT count(*) FROM consult.person"
            eventually(lambda conn=conn, ask=ask: conn.execute(ask).fetchone(), (2,))


def emergency(lsn: int):
    vitals = [{"record_id": f"v{lsn}", "pulse_per_min": 0, "patient_id": "P1", "_lsn": lsn}]
    return batch_of({"vital_sign": rows_of("vital_sign", vitals)}, lane=Lane.EMERGENCY)


def test_an_emergency_waits_for_no_judgement(stores):
    """All of a look's locks are held while deliveries of both lanes come: none waits."""
    conn = stores["primary"]
    StoreRows(conn).put("vital_sign", "main", "1", pulse_per_min=0, patient_id="P1")
    store = Store(conn.info.dsn, LINK, "main", None, lambda: COMMIT_US)
    store.apply([emergency(5000)], Lane.EMERGENCY)
    with psycopg.connect(conn.info.dsn) as judge:
        done = check_store.check_campus(judge, LINK, load_quality_rules(), NOW_US)
        assert done.found and done.whole
        # Not even one who locks its tables whole.
        judge.execute("LOCK TABLE sync.quality_alarm, sync.quality_progress, sync.person_record")
        store._conn.execute("SET lock_timeout = '1s'")  # Who waits for them is refused.
        receipt = store.apply([emergency(6000)], Lane.EMERGENCY)
        assert receipt.counts.delivered == 1
        vitals = [{"record_id": "1", "pulse_per_min": 75, "patient_id": "P1", "_lsn": 7000}]
        routine = batch_of({"vital_sign": rows_of("vital_sign", vitals)})
        assert store.apply([routine], Lane.ROUTINE).counts.captured == 1
        judge.rollback()
    store.close()


def test_what_is_open_is_counted_in_view_and_report(stores, campus_file):
    config = load(campus_file())
    for name, conn in stores.items():
        StoreRows(conn, name).put("vital_sign", "main", "1", pulse_per_min=0)
    with Upkeep(config, Rules.load(config)):
        for conn in stores.values():
            eventually(lambda conn=conn: conn.execute(ALARMS).fetchall(), [ALARM])
    with Observer(config) as observer:
        view, report = observer.view(NOW_US), observer.report(NOW_US)
    for found in (view, report):
        counted = {part.store: part.open for part in found.alarms if part.rule == 1}
        assert counted == {"primary": 1, "main": 1}
        assert {part.store for part in found.tending} == {"primary", "main"}
        assert all(part.judged_us and part.matched_us for part in found.tending)
    assert {part.ever for part in report.alarms} == {1}
