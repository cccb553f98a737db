"""Rows laid straight into a consult store, with a ledger that has reached them."""

import dataclasses
import datetime
import itertools

import psycopg

from schemas.entities import TABLES
from schemas.positions import SEQ_END

AT = datetime.datetime(2026, 11, 23, 4, tzinfo=datetime.UTC)


@dataclasses.dataclass
class StoreRows:
    """Writes rows of several campuses, each at its campus's next position."""

    conn: psycopg.Connection
    store: str = "primary"

    def __post_init__(self):
        self._positions: dict[str, itertools.count] = {}
        self._last: dict[str, int] = {}

    def put(self, table: str, campus: str, record_id: str, deleted: bool = False, **values) -> int:
        """Inserts a row or gives it a new version; returns its position."""
        return self.put_many(table, campus, [{"record_id": record_id, **values}], deleted)

    def put_many(self, table: str, campus: str, rows: list[dict], deleted: bool = False) -> int:
        names = [column.name for column in TABLES[table].columns]
        lsn = next(self._positions.setdefault(campus, itertools.count(1000, 10)))
        columns = ["campus", "record_id", *names, "src_table", "src_lsn", "src_seq"]
        columns += ["committed_at", "hlc", "lane", "security_level", "deleted"]
        quoted = ", ".join(f'"{name}"' for name in columns)
        sets = ", ".join(f'"{name}" = excluded."{name}"' for name in columns[2:])
        statement = (
            f"INSERT INTO consult.{table} ({quoted}) VALUES ({', '.join(['%s'] * len(columns))})"
            f" ON CONFLICT (record_id, campus) DO UPDATE SET {sets}"
        )
        with self.conn.transaction(), self.conn.cursor() as cursor:
            cursor.executemany(
                statement.encode(),
                [
                    (
                        campus,
                        row["record_id"],
                        *(row.get(name) for name in names),
                        f"source.{table}",
                        lsn,
                        seq,
                        AT,
                        0,
                        "R",
                        4,
                        deleted,
                    )
                    for seq, row in enumerate(rows, 1)
                ],
            )
        self.reach(campus, lsn)
        return lsn

    def reach(self, campus: str, lsn: int) -> None:
        """Moves the ledger of the campus's link."""
        self.conn.execute(
            "INSERT INTO sync.progress (link, lane, lsn, seq, captured, delivered, duplicates,"
            " superseded, held, dead, swept, commit_us, watermark_us)"
            " VALUES (%s, 'routine', %s, %s, 0, 0, 0, 0, 0, 0, 0, 0, %s)"
            " ON CONFLICT (link, lane) DO UPDATE SET lsn = excluded.lsn",
            (f"{campus}>{self.store}", lsn, SEQ_END, int(AT.timestamp() * 1e6)),
        )
