"""A MariaDB server for the tests, and an empty database of it for each one that asks."""

import collections.abc
import itertools

import pytest

from runners.embedded.mariadb import MariaDbServer


@pytest.fixture(scope="session")
def mariadb_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> collections.abc.Iterator[MariaDbServer]:
    """A running MariaDB server, one for each test process; not for tests that kill servers."""
    server = MariaDbServer(tmp_path_factory.mktemp("mariadb") / "server", durable=False)
    yield server.start()
    server.remove()


@pytest.fixture(scope="session")
def _mariadb_numbers() -> collections.abc.Iterator[int]:
    return itertools.count(1)


@pytest.fixture
def mariadb_database(
    mariadb_server: MariaDbServer, _mariadb_numbers: collections.abc.Iterator[int]
) -> str:
    """The connection string of an empty GBK database that no other test uses."""
    return mariadb_server.create_database(f"test_{next(_mariadb_numbers)}")


@pytest.fixture
def make_mariadb(tmp_path) -> collections.abc.Iterator[collections.abc.Callable]:
    """Makes servers that this test alone may kill: `make_mariadb("name", settings=...)`."""
    servers = []

    def make(name: str = "server", **arguments) -> MariaDbServer:
        server = MariaDbServer(tmp_path / name, **{"durable": False} | arguments)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.remove()
