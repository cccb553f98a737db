"""What the store's trigger makes of a client's statements, and what it refuses."""

import psycopg
import pytest

from schemas.siblings import record_from_json
from schemas.versions import to_text
from tests.edited_stores import PLAN, RULES, EditedStore
from tests.store_rows import StoreRows
from transforms.deliver import store_schema
from transforms.deliver.edits.hold_records import Records
from transforms.deliver.edits.record_keys import Key
from transforms.row_sets import StoreSide


@pytest.fixture(scope="module")
def store(postgres_server):
    made = EditedStore("east", postgres_server.create_database("edits"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _as_nobody(request):
    if "store" in request.fixturenames:
        request.getfixturevalue("store").as_("D1", "attending", "routine")


def entries_of(store: EditedStore, record_id: str, group: str) -> list:
    return list(store.record(record_id).entries(group).values())


def test_an_edit_is_stamped_with_who_when_and_what_was_seen(store):
    store.as_("D7", "consultant", "emergency")
    store.insert("p1", patient_id="P1", title="t", content="one", status="draft")
    actor, lane, hlc = store.own.execute("SELECT actor, lane, hlc FROM sync.edit").fetchone()
    assert lane == "emergency" and actor.startswith("east.")
    store.as_("D8", "attending", "routine")
    assert store.update("p1", content="two") == 1
    store.fold()
    assert store.row("p1", "version_vector", "lane") == ({actor: 2}, "R")
    (entry,) = entries_of(store, "p1", "plan")
    assert entry.values["content"] == "two" and entry.values["title"] == "t"
    assert (entry.stamp.editor, entry.stamp.role, entry.stamp.lane) == (
        "D8",
        "attending",
        "routine",
    )
    assert entry.stamp.hlc > hlc
    text, row = store.own.execute(
        "SELECT r.record::text, t.version_vector::text FROM sync.record r JOIN consult."
        f"{PLAN} t USING (record_id) WHERE record_id = 'p1'"
    ).fetchone()
    assert to_text(record_from_json(text).seen) == row
    met = store.own.execute(
        "SELECT edit #>> '{wrote,plan,values,content}' FROM sync.version WHERE record_id = 'p1'"
        " AND edit -> 'wrote' ? 'plan' ORDER BY counter"
    ).fetchall()
    assert met == [("one",), ("two",)]


def test_a_shown_row_has_the_digest_of_its_content(store):
    name = "emr_document"
    store.insert("dig", name, title="甲", written_at="2026-11-23 08:00+08", content="乙")
    store.fold()
    (digest,) = store.row("dig", "digest", table=name)
    assert len(digest) == 32
    store.update("dig", name, content="丙")
    store.insert("new", name, title="丁")
    side = StoreSide("east", store.dsn)
    with side.connect() as conn:  # It is not what it was any more, nor yet anew.
        (rows,) = side.rows(conn, "main", name)
        assert len(rows) == 2 and rows.edited.all()  # So that it is no damage.
    store.fold()
    assert store.row("dig", "digest", table=name) != (digest,)


def test_history_is_only_added_to(store):
    store.insert("hist", title="x")
    store.fold()
    for statement in ("UPDATE sync.version SET actor = 'x'", "DELETE FROM sync.version"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="only added to"):
            store.client.execute(statement)


@pytest.mark.parametrize(
    ("statement", "what", "remedy"),
    [
        ("UPDATE consult.treatment_plan SET content = 'x' WHERE record_id = 'arch'", "archived",
         "new"),
        ("DELETE FROM consult.treatment_plan WHERE record_id = 'arch'", "archived", "new"),
        ("UPDATE consult.treatment_plan SET patient_id = 'x' WHERE record_id = 'ok'",
         "patient_id of this row of treatment_plan has one writer", "edit only"),
        ("UPDATE consult.treatment_plan SET record_id = 'x' WHERE record_id = 'ok'", "key",
         "delete"),
        ("UPDATE consult.treatment_plan SET title = 'y', src_lsn = 7 WHERE record_id = 'ok'",
         "sync's own", "leave"),
        ("UPDATE consult.treatment_plan SET title = 'y', deleted = true WHERE record_id = 'ok'",
         "at once", "one after the other"),
        ("INSERT INTO consult.treatment_plan (campus, record_id, src_lsn) VALUES ('main', 'n', 5)",
         "place in a source's log", "leave out"),
        ("INSERT INTO consult.patient (campus, record_id) VALUES ('main', 'n')",
         "created by the campus's own system", "register"),
        ("UPDATE consult.patient SET name = 'x' WHERE record_id = '1'", "one writer", "phone"),
        ("UPDATE consult.patient SET abo = 'A' WHERE record_id = '1'", "one writer", "phone"),
        ("DELETE FROM consult.patient WHERE record_id = '1'", "removed by the campus's", "there"),
        ("UPDATE consult.patient SET phone = '1' WHERE record_id = '2'", "deleted", "NOT deleted"),
        ("SET LOCAL campus_sync.lane = 'fast'; UPDATE consult.treatment_plan SET title = 'y'"
         " WHERE record_id = 'ok'", "neither emergency nor routine", "leave it out"),
        ("SET LOCAL campus_sync.role = 'boss'; UPDATE consult.treatment_plan SET title = 'y'"
         " WHERE record_id = 'ok'", "no role", "superior, attending"),
    ],
)  # fmt: skip
def test_what_is_no_edit_is_refused_with_its_remedy(refusing, statement, what, remedy):
    with pytest.raises(psycopg.errors.RaiseException, match=what) as told:
        refusing.client.execute(statement)
    assert "Remedy: " in told.value.diag.message_hint and remedy in told.value.diag.message_hint


@pytest.fixture(scope="module")
def refusing(store):
    rows = StoreRows(store.own)  # As the sync lays them: its session is not a client's.
    rows.put("patient", "main", "1", patient_id="P1", name="n")
    rows.put("patient", "main", "2", deleted=True, patient_id="P2")
    store.insert("ok", patient_id="P1", title="t")
    store.insert("arch", title="t", status="archived")
    return store


def test_inserting_over_a_living_row_is_a_unique_violation_and_upsert_an_edit(store):
    store.fold()
    store.insert("one", title="a")
    with pytest.raises(psycopg.errors.UniqueViolation):
        store.insert("one", title="b")
    store.client.execute(
        f"INSERT INTO consult.{PLAN} (campus, record_id, title) VALUES ('main', 'one', 'c')"
        " ON CONFLICT (record_id, campus) DO UPDATE SET title = excluded.title"
    )
    assert store.fold() == 1
    assert store.row("one", "title") == ("c",)
    edits = "SELECT count(*) FROM sync.version WHERE record_id = 'one' AND edit -> 'wrote' ? 'plan'"
    assert store.own.execute(edits).fetchone() == (2,)


def test_a_rolled_back_edit_never_was(store):
    store.insert("back", title="a")
    with store.client.transaction(force_rollback=True):
        store.update("back", title="b")
    store.fold()
    assert store.row("back", "title", "version_vector")[0] == "a"
    assert list(store.record("back").seen.values()) == [1]


def test_what_changes_nothing_is_no_edit(store):
    store.insert("same", title="a")
    store.fold()
    assert store.update("same", title="a") == 1
    assert store.fold() == 0


@pytest.mark.parametrize("folded", [False, True])
def test_a_deleted_number_may_begin_anew_and_goes_on_counting(store, folded):
    name = f"again{folded}"
    store.insert(name, title="a", content="old")
    if folded:
        store.fold()
    assert store.delete(name) == 1
    if folded:
        store.fold()
    assert store.row(name, "title") is None
    assert store.update(name, title="x") == 0
    store.insert(name, title="b")
    store.fold()
    assert store.row(name, "title", "content") == ("b", None)
    assert list(store.record(name).seen.values()) == [3]


def test_marking_as_deleted_is_deleting(store):
    store.insert("mark", title="a")
    store.update("mark", deleted=True)
    assert store.row("mark", "title") is None
    store.fold()
    assert store.row("mark", "title") is None


def test_a_sources_row_that_a_client_deletes_stays_as_its_guard(store):
    StoreRows(store.own).put("emr_document", "main", "e1", patient_id="P", title="t")
    assert store.delete("e1", "emr_document") == 1
    assert store.row("e1", "deleted", "src_lsn", table="emr_document") == (True, 1000)
    store.fold()
    assert store.row("e1", "deleted", "title", table="emr_document") == (True, "t")
    assert store.delete("e1", "emr_document") == 1  # It stays, as what it is.
    assert store.fold() == 0
    assert store.row("e1", "deleted", table="emr_document") == (True,)


def test_two_clients_wait_for_each_other_and_the_second_has_seen_the_first(store):
    store.insert("two", title="a", follow_up="1")
    with psycopg.connect(store.dsn) as first:
        first.execute(f"UPDATE consult.{PLAN} SET title = 'b' WHERE record_id = 'two'")
        with psycopg.connect(store.dsn) as other, pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute("SET lock_timeout = '50ms'")
            other.execute(f"UPDATE consult.{PLAN} SET title = 'c' WHERE record_id = 'two'")
        # Whoever folds passes over what a client holds.
        held = Records(store.own, RULES).update([Key(PLAN, "main", "two")], wait=False)
        assert held.skipped == {Key(PLAN, "main", "two")} and not held.learned
    store.update("two", title="c")
    store.fold()
    (entry,) = entries_of(store, "two", "plan")
    assert entry.values["title"] == "c"
    assert not store.open_conflicts()


def test_a_client_without_rights_in_sync_may_edit_and_not_pass_for_the_sync(store):
    store.own.execute("CREATE ROLE ward LOGIN")
    store.own.execute(f"GRANT USAGE ON SCHEMA consult TO ward; GRANT SELECT, INSERT, UPDATE, DELETE"
                      f" ON consult.{PLAN} TO ward")  # fmt: skip
    with psycopg.connect(store.dsn, user="ward", autocommit=True) as ward:
        ward.execute("SET campus_sync.session = 'sync'; SET search_path = pg_temp")
        ward.execute(
            f"INSERT INTO consult.{PLAN} (campus, record_id, title) VALUES ('e', 'w', 'x')"
        )
        with pytest.raises(psycopg.errors.RaiseException, match="sync's own"):
            ward.execute(f"UPDATE consult.{PLAN} SET version_vector = '{{}}' WHERE record_id = 'w'")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ward.execute("UPDATE sync.store SET clock_offset_us = 1")
    editor = "SELECT editor, role, lane FROM sync.edit WHERE record_id = 'w'"
    assert store.own.execute(editor).fetchone() == ("ward", "", "routine")
    store.fold()


def test_a_store_that_is_not_open_takes_no_clients_edits(database):
    with psycopg.connect(database, autocommit=True) as owner:
        store_schema.ensure(owner)
        owner.execute("GRANT USAGE ON SCHEMA consult TO PUBLIC; GRANT INSERT ON consult."
                      f"{PLAN} TO PUBLIC; CREATE ROLE nurse LOGIN")  # fmt: skip
        with (
            psycopg.connect(database, user="nurse") as nurse,
            pytest.raises(psycopg.errors.RaiseException, match="not open for edits") as told,
        ):
            nurse.execute(f"INSERT INTO consult.{PLAN} (campus, record_id) VALUES ('m', '1')")
        assert "campus-sync run" in told.value.diag.message_hint
