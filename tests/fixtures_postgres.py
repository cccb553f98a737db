"""A PostgreSQL server for the tests, and an empty database of it for each one that asks."""

import collections.abc
import itertools
import shutil

import pytest

from runners.embedded.postgres import PostgresServer

# Short timeouts: a test that breaks a connection shall not wait for a minute.
TEST_SETTINGS = {
    "wal_sender_timeout": "10s",
    "max_prepared_transactions": 8,
    "max_wal_size": "512MB",
    "autovacuum_naptime": "10min",
}


@pytest.fixture(scope="session")
def postgres_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> collections.abc.Iterator[PostgresServer]:
    """A running PostgreSQL server, one for each test process; not for tests that kill servers."""
    directory = tmp_path_factory.mktemp("postgres") / "server"
    with PostgresServer(directory, settings=TEST_SETTINGS, durable=False) as server:
        yield server
    shutil.rmtree(server.data)  # The log stays, the 40 MB need not.


@pytest.fixture(scope="session")
def _database_numbers() -> collections.abc.Iterator[int]:
    return itertools.count(1)


@pytest.fixture
def database(
    postgres_server: PostgresServer, _database_numbers: collections.abc.Iterator[int]
) -> str:
    """The connection string of an empty database that no other test uses."""
    return postgres_server.create_database(f"test_{next(_database_numbers)}")


@pytest.fixture
def make_server(tmp_path) -> collections.abc.Iterator[collections.abc.Callable]:
    """Makes servers that this test alone may kill: `make_server("name", settings=..., port=0)`."""
    servers = []

    def make(name: str = "server", **arguments) -> PostgresServer:
        arguments["settings"] = TEST_SETTINGS | arguments.get("settings", {})
        server = PostgresServer(tmp_path / name, **{"durable": False} | arguments)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.stop("immediate")
        shutil.rmtree(server.data, ignore_errors=True)
