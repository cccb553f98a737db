"""Record what MariaDB logs of every type: `python -m tests.record_mariadb_types` does it anew."""

import pathlib
import struct
import tempfile

from runners.embedded.mariadb import MariaDbServer
from schemas.positions import SEQ_END, Position
from tests.mariadb_types import CASES, NULL
from transforms.capture.mariadb.packets import Packets
from transforms.capture.mariadb.places import border
from transforms.capture.mariadb.stream import BinlogStream

RECORDING = pathlib.Path(__file__).parent / "golden" / "mariadb_types.binlog"
RECORDED = [case for case in CASES if not case.type.startswith("LONGTEXT")]
BEGIN = Position(border(1, 4), SEQ_END)


def read_recording() -> list[bytes]:
    """Returns the recorded packets."""
    content, packets, at = RECORDING.read_bytes(), [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at)
        packets.append(content[at + 4 : at + 4 + size])
        at += 4 + size
    return packets


def _record(server: MariaDbServer) -> list[bytes]:
    dsn = server.create_database("his")
    with server.connect("his") as connection, connection.cursor() as cursor:
        cursor.execute("SET sql_mode = '', time_zone = '+08:00'")
        for number, case in enumerate(RECORDED):
            cursor.execute(f"CREATE TABLE t{number} (k INT PRIMARY KEY, v {case.type})")
        cursor.execute("RESET MASTER")
        for number, case in enumerate(RECORDED):
            rows = [f"({k}, {v})" for k, (v, _) in enumerate([*case.values, NULL])]
            cursor.execute(f"INSERT INTO t{number} VALUES {', '.join(rows)}")
        cursor.execute("SHOW MASTER STATUS")
        end = border(1, int(cursor.fetchone()[1]))
    recorded: list[bytes] = []
    arguments = {"reader_id": 99, "batch_rows": 1000, "batch_bytes": 1 << 20}
    with BinlogStream(dsn, BEGIN, keys={}, **arguments) as stream:
        decode = stream._decode

        def keep(packets: Packets) -> list:
            for start, stop in zip(packets.starts, packets.ends, strict=True):
                recorded.append(packets.data[start:stop].tobytes())
            return decode(packets)

        stream._decode = keep
        while stream._decoder.log_end < end:
            stream.read(0.1)
    return recorded


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        made = MariaDbServer(pathlib.Path(directory) / "server", durable=False).start()
        try:
            packets = _record(made)
        finally:
            made.remove()
    RECORDING.write_bytes(b"".join(struct.pack("<I", len(p)) + p for p in packets))
    print(f"{RECORDING}: {len(packets)} packets, {RECORDING.stat().st_size} bytes")
