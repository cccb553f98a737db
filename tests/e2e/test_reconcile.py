"""Reconciliation on real servers: seeded damage is found and mended while changes flow."""

import json

import pyarrow as pa
import pytest

from pipelines.differences import Ends
from pipelines.reconcile import Task
from runners.cli import main
from runners.reconcile import run_direct, run_task
from schemas.batches import Lane
from schemas.clocks import monotonic_s, wall_clock_us
from tests.damaged_site import FIRST, VITALS, traffic
from tests.faults.harness import CAMPUS
from transforms.deliver.mend_rows import as_changes, as_tombstones
from transforms.deliver.store import Store
from transforms.seal_dead_letters import Sealer
from transforms.sign_report import verify

pytest_plugins = ["tests.damaged_site"]


def differing(result) -> dict[str, int]:
    kinds = ("missing", "different", "rotten", "extra")
    return {kind: n for kind in kinds if (n := getattr(result, kind))}


@pytest.mark.parametrize("made", [1, 2, 3], indirect=True)
def test_seeded_damage_is_found_and_mended_while_changes_flow(made, tmp_path, request):
    seed = request.node.callspec.params["made"]
    name = ("primary", "main")[seed % 2]
    with traffic(made.site, seed):
        clean = made.run(tmp_path / "clean")
        assert clean.sound, [one for one in (*clean.links, *clean.pairs) if one.differing]
        expected = made.damage(name)

        found = made.run(tmp_path / "found")
        assert not found.sound
        for one in found.links:
            hurt = (one.store, one.table) == (name, "vital_sign")
            assert differing(one) == (expected if hurt else {}), one
            assert one.settled and not one.mended

        mended = made.run(tmp_path / "mended", repair=True)
        assert mended.sound, mended
        assert sum(one.mended for one in mended.links) == 7
        assert made.run(tmp_path / "again").sound
    made.site.drain()
    made.site.prove()


def test_a_day_s_changes_are_enough_to_find_what_one_store_lacks(made, tmp_path):
    made.damage("main")
    found = made.run(tmp_path / "all", since_us=1_000_000)
    by_store = {one.store: differing(one) for one in found.links if one.table == "vital_sign"}
    assert by_store == {
        "primary": {},
        "main": {"missing": 3, "different": 2, "rotten": 1, "extra": 1},
    }
    assert not any(map(differing, made.run(tmp_path / "none", since_us=wall_clock_us()).links))


def test_a_newer_change_wins_over_what_is_mended(made):
    """The view is older than the change, whichever of the two comes to the store first."""
    first, second = made.take(2)
    ends = Ends(made.site.config, 60, monotonic_s)
    settings = made.site.settings()
    store = Store(
        settings.store_dsn, settings.name, CAMPUS, Sealer(settings.key_ref), wall_clock_us
    )
    with ends.sources[CAMPUS].reading(30) as view, made.site.hospital() as hospital:
        hospital.execute(f"UPDATE his.vital_sign SET pulse = 99 WHERE vital_id = {first}")
        hospital.execute(f"DELETE FROM his.vital_sign WHERE vital_id = {second}")
        made.site.drain()
        (rows,) = view.changes("vital_sign", [first, second])
        assert rows.num_rows == 2
        counts = store.mend("vital_sign", as_changes("vital_sign", rows, view.given_lsn, 1))
        assert (counts.captured, counts.superseded) == (2, 2)
        # And what the view lacks: a tombstone of its place does not outlive a later insert.
        late = str(FIRST + 777)
        gone = as_tombstones("vital_sign", *late_ids(late), view.given_lsn, 1)
        assert store.mend("vital_sign", gone).delivered == 1
        hospital.execute(VITALS, [FIRST + 776, 1])
    made.site.drain()
    made.site.prove()
    store.close()


def late_ids(record_id: str) -> tuple[pa.Array, pa.Array]:
    return pa.array([record_id]), pa.array(["his.vital_sign"])


def test_mending_twice_at_one_end_of_the_log_mends(made, tmp_path):
    """The log does not grow in between: the second delivery has the same LSN and a later place."""
    (record_id,) = made.take(1)
    for number in range(2):
        with made.store("primary") as store:
            store.execute(
                "UPDATE consult.vital_sign SET visit_no = 'no' WHERE record_id = %s", [record_id]
            )
        mended = made.run(tmp_path / str(number), repair=True, tables=("vital_sign",))
        assert [one.mended for one in mended.links if one.store == "primary"] == [1]
    made.site.prove()


def test_a_row_that_claims_a_place_beyond_the_log_is_not_taken_for_moving(made, tmp_path):
    """The guard lets nothing pass it: it is told, and left to a person."""
    with made.store("primary") as store:
        store.execute(
            "UPDATE consult.vital_sign SET visit_no = 'no', src_lsn = src_lsn + (1::bigint << 50)"
            " WHERE record_id = %s",
            made.take(1),
        )
    left = made.run(tmp_path / "left", repair=True, tables=("vital_sign",))
    assert [(one.different, one.mended, one.sound) for one in left.links] == [
        (1, 0, False) if one.store == "primary" else (0, 0, True) for one in left.links
    ]


def test_a_store_that_does_not_follow_is_not_mended(made, tmp_path):
    with made.site.hospital() as hospital:
        hospital.execute("SELECT pg_logical_emit_message(true, '', '')")
    made.damage("primary")
    with made.store("primary") as store, store.transaction():
        # Nobody can deliver: the ledger's row is kept.
        store.execute("SELECT FROM sync.progress WHERE lane = %s FOR UPDATE", [Lane.ROUTINE.value])
        with made.site.hospital() as hospital:
            hospital.execute(VITALS, [FIRST + 1000, 5])
        folder = tmp_path / "stopped"
        folder.mkdir()
        task = Task(settle_s=3, repair=True, tables=("vital_sign",))
        made_of = run_task(made.site.config, task, folder, run_direct)
    behind = {one.store: one.settled for one in made_of.links}
    assert behind == {"primary": False, "main": True}
    assert not made_of.sound and not any(one.mended for one in made_of.links)


def test_many_rows_that_differ_are_read_by_buckets(made, monkeypatch):
    ends = Ends(made.site.config, 60, monotonic_s)
    with made.store("primary") as store:
        store.execute("DELETE FROM consult.vital_sign WHERE campus = %s", [CAMPUS])
    first = ends.first_look(CAMPUS, "vital_sign")
    ids, none = first.suspects("primary")
    assert len(ids) == 300 and not len(none)
    link = next(one for one in ends.links(CAMPUS) if one.store == "primary")
    buckets = first.source.unequal(first.stores["primary"].live)
    excuses = ends.excuses(link, "vital_sign")
    monkeypatch.setattr("pipelines.differences._GROUP_ROWS", 5)
    parts = list(ends.look_closer(link, "vital_sign", None, buckets, 300, excuses))
    assert len(parts) >= 3
    keys = [key for part in parts for key in part.rows("missing").ids.to_pylist()]
    assert len(set(keys)) == len(keys) == 300


def test_the_command_reports_what_it_found_signed_and_without_a_name(made, tmp_path, capsys):
    expected = made.damage("main")
    path = tmp_path / "found.json"
    arguments = ["reconcile", "--config", str(made.site.path), "--table", "vital_sign"]
    assert main([*arguments, "--report", str(path)]) == 1
    text = path.read_text()
    report, _ = verify(json.loads(text))
    (hurt,) = [one for one in report["links"] if one["store"] == "main"]
    assert {kind: hurt[kind] for kind in expected} == expected
    assert len(hurt["keys"]) == 7
    assert str(FIRST)[:6] not in text and "ghost" not in text
    assert path.with_suffix(".txt").read_text().count("vital_sign") == 2

    assert main([*arguments, "--repair", "--json"]) == 0
    out = capsys.readouterr().out
    assert verify(json.loads(out[out.index('{\n "report"') :]))[0]["sound"]
    assert main(["verify-report", str(path), "--config", str(made.site.path)]) == 0
    path.write_text(text.replace('"missing": 3', '"missing": 0'))
    assert main(["verify-report", str(path)]) == 1
    assert main([*arguments[:-1], "nonsense"]) == 2
