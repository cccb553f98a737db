"""Every type of a PostgreSQL column x value and NULL: snapshot and log give the same known text."""

import psycopg

from tests.e2e.test_capture_postgresql import capture  # noqa: F401  A fixture.
from tests.mariadb_types import NULL
from tests.postgresql_types import CASES
from tests.raw_changes import rows_of


def test_every_type_reads_the_same_from_log_and_snapshot(database, capture):  # noqa: F811
    keys = {f"public.t{number}": ("k",) for number in range(len(CASES))}
    expected, inserts = {}, []
    for number, case in enumerate(CASES):
        for k, (value, text) in enumerate([*case.values, NULL]):
            inserts.append(f"INSERT INTO t{number} VALUES ({k}, {value})")
            expected[f"public.t{number}", str(k)] = (case.type, text)
    with psycopg.connect(database, autocommit=True) as source:
        source.execute("CREATE TYPE mood AS ENUM ('急', 'b'); CREATE DOMAIN yes AS boolean")
        source.execute("CREATE TYPE pair AS (a int, b text)")
        for number, case in enumerate(CASES):
            source.execute(f"CREATE TABLE t{number} (k int PRIMARY KEY, v {case.type})")
        for statement in inserts:
            source.execute(statement)
        link = capture(keys)
        read = link.start()
        for number in range(len(CASES)):
            source.execute(f"DELETE FROM t{number}")
        for statement in inserts:
            source.execute(statement)
        logged = [row for row in rows_of(link.drain()) if row["_op"] == ord("I")]
    for rows in (rows_of(read), logged):
        found = {(row["table"], row["k"]): row["v"] for row in rows}
        wrong = {
            expected[place][0]: (found.get(place, "absent"), text)
            for place, (_, text) in expected.items()
            if found.get(place, "absent") != text
        }
        assert not wrong
