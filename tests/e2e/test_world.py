"""The embedded world of PostgreSQL campuses: up, down, up again, as root and as anybody."""

import base64
import json
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile

import psycopg
import pytest

from runners.embedded import world
from runners.embedded.binaries import ServerError, programs, server_account
from runners.embedded.process_tree import identify
from schemas.config import load
from schemas.mappings import load_mapping

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    world.up(directory, durable=False, campuses=world.POSTGRESQL)
    yield directory
    world.remove(directory)


def pids(directory) -> dict[str, int | None]:
    return {name: server["pid"] for name, server in world.status(directory).items()}


def test_seven_servers_run_and_the_configuration_leads_to_them(place):
    status = world.status(place)
    assert list(status) == [
        *("source-main", "source-east", "source-west"),
        *("store-primary", "store-main", "store-east", "store-west"),
    ]
    assert all(server["running"] and server["size_bytes"] > 10**7 for server in status.values())
    json.dumps(status)
    config = load(place / "campuses.yaml")
    assert len(config.links()) == 12
    for part in (*config.sources.values(), *config.stores.values()):
        with psycopg.connect(part.dsn) as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("sync",)
    assert pathlib.Path(config.sources["west"].mapping).stem == "postgresql_his_us_units"


def test_key_is_secret_and_fit(place):
    key = place / "dead-letter.key"
    assert oct(key.stat().st_mode)[-3:] == "600"
    assert len(base64.b64decode(key.read_text())) == 32


@pytest.mark.parametrize("campus", world.CAMPUSES)
def test_source_is_published_for_reading_only(place, campus):
    source = load(place / "campuses.yaml").sources[campus]
    with psycopg.connect(source.dsn, autocommit=True) as connection:
        published = connection.execute(
            "SELECT schemaname || '.' || tablename FROM pg_publication_tables"
            " WHERE pubname = 'campus_sync'"
        ).fetchall()
        columns = connection.execute(
            "SELECT table_schema || '.' || table_name, array_agg(column_name::text)"
            " FROM information_schema.columns WHERE table_schema IN ('his', 'lis', 'emr')"
            " GROUP BY 1"
        ).fetchall()
        full = connection.execute(
            "SELECT oid::regclass::text FROM pg_class WHERE relreplident = 'f' AND relkind = 'r'"
        ).fetchall()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("DELETE FROM his.patient")
        with psycopg.connect(source.dsn, replication="database", autocommit=True) as reader:
            assert reader.execute("IDENTIFY_SYSTEM").fetchone() is not None
    mapping = load_mapping(source.mapping)
    assert {name for (name,) in published} == set(mapping.tables)
    assert mapping.compare_columns(dict(columns)) == []
    assert {name for (name,) in full} == {
        *("his.patient", "his.consultation", "lis.result", "emr.document")
    }


def test_sources_are_three_systems(place):
    """Servers copied from one another would share their identifier, and a mix-up stay unseen."""
    identifiers = set()
    for source in load(place / "campuses.yaml").sources.values():
        with psycopg.connect(source.dsn) as connection:
            query = "SELECT system_identifier FROM pg_control_system()"
            identifiers.add(connection.execute(query).fetchone()[0])
    assert len(identifiers) == 3


def test_second_up_keeps_servers_data_and_the_users_edits(place):
    config = place / "campuses.yaml"
    config.write_text(config.read_text() + "metrics_port: 9108\n")
    key, before = (place / "dead-letter.key").read_text(), pids(place)
    world.up(place, durable=False)
    assert pids(place) == before
    assert config.read_text().endswith("metrics_port: 9108\n")
    assert (place / "dead-letter.key").read_text() == key


def test_down_leaves_nothing_running_and_up_brings_the_data_back(place):
    dsn = load(place / "campuses.yaml").stores["east"].dsn
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS a")
    before, ports = pids(place), {n: s["port"] for n, s in world.status(place).items()}
    world.down(place)
    world.down(place)
    assert all(identify(pid) is None for pid in before.values())
    assert not any(server["running"] for server in world.status(place).values())
    world.up(place, durable=False)
    assert {n: s["port"] for n, s in world.status(place).items()} == ports
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT a FROM kept").fetchone() == (1,)


def test_killed_store_leaves_its_source_and_comes_back(place):
    servers = world.servers(place, durable=False)
    store, source = servers["store-west"], servers["source-west"]
    before = pids(place)
    with psycopg.connect(load(place / "campuses.yaml").stores["west"].dsn) as connection:
        connection.execute("CREATE TABLE survived AS SELECT 1 AS a")
    store.kill()
    assert not store.running and source.running
    world.up(place, durable=False)
    after = pids(place)
    assert after.pop("store-west") != before.pop("store-west")
    assert after == before
    with psycopg.connect(load(place / "campuses.yaml").stores["west"].dsn) as connection:
        assert connection.execute("SELECT a FROM survived").fetchone() == (1,)


def test_failed_up_leaves_nothing_running_and_says_why(place):
    taken = world.status(place)["store-main"]["port"]
    world.down(place)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", taken))
        other.listen()
        with pytest.raises(ServerError, match=rf"store-main: port {taken} is taken.*Remedy"):
            world.up(place, durable=False)
    assert not any(server["running"] for server in world.status(place).values())
    world.up(place, durable=False)


def test_nothing_is_no_world(tmp_path):
    world.down(tmp_path / "nowhere")
    status = world.status(tmp_path / "nowhere")
    assert len(status) == 8
    nothing = {"running": False, "port": None, "pid": None, "size_bytes": 0}
    assert all(server == nothing for server in status.values())
    assert not (tmp_path / "nowhere").exists()


def test_a_world_keeps_its_kind_of_campuses(place):
    with pytest.raises(ServerError, match=r"world of postgresql campuses.*Remedy"):
        world.up(place, durable=False, campuses=world.UNLIKE)
    assert world.kind_of(place) == world.POSTGRESQL


def test_configuration_of_another_world_is_not_overwritten(tmp_path):
    (tmp_path / "campuses.yaml").write_text("version: 1\n")
    with pytest.raises(ServerError, match=r"another world.*Remedy"):
        world.up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["campuses.yaml"]


# Everything is imported before root's rights go: interpreter and source may be in root's home.
AS_ORDINARY_USER = """
import concurrent.futures.thread, encodings.idna, json, os, sys
sys.path[:0] = [sys.argv[2]]
from runners.embedded import world
import schemas.config, schemas.mappings
uid, gid = int(sys.argv[3]), int(sys.argv[4])
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(gid), os.setuid(uid)
directory = sys.argv[1]
try:
    world.up(directory, durable=False, campuses=world.POSTGRESQL)
    running = world.status(directory)
finally:
    world.down(directory)
print(json.dumps([running, world.status(directory)]))
"""


def test_ordinary_user_has_a_world_too():
    directory = pathlib.Path(tempfile.mkdtemp())  # Not below pytest's, which is ours alone.
    user = pwd.getpwuid(os.geteuid())
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        os.chown(directory, user.pw_uid, user.pw_gid)
    packages = programs(server_account(directory / "none")).parents[2]
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-c", AS_ORDINARY_USER, directory, packages),
                *(str(user.pw_uid), str(user.pw_gid)),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        up, down = json.loads(done.stdout)
        assert all(server["running"] for server in up.values())
        assert not any(server["running"] for server in down.values())
        key = directory / "dead-letter.key"
        assert (key.stat().st_uid, oct(key.stat().st_mode)[-3:]) == (user.pw_uid, "600")
        assert (directory / "servers/source-main/data").stat().st_uid == user.pw_uid
    finally:
        shutil.rmtree(directory)
