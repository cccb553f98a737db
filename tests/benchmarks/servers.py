"""PostgreSQL servers as fast as the benchmarks want them, and a folder of theirs."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Mapping

from runners.embedded.postgres import PostgresServer

SETTINGS = {
    "synchronous_commit": "off",
    "wal_writer_delay": "10ms",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "autovacuum": "off",
}


@contextlib.contextmanager
def running(
    *names: str, settings: Mapping[str, str] = SETTINGS
) -> Iterator[tuple[pathlib.Path, list[PostgresServer]]]:
    """Yields a folder and running servers of these names in it; leaves neither behind."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = pathlib.Path(folder)
        root.chmod(0o755)
        yield (
            root,
            [stack.enter_context(PostgresServer(root / name, settings=settings)) for name in names],
        )
