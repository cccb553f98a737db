"""Records what real Debezium connectors say of made-up rows, as ../README.md tells.

    mvn -f pom.xml dependency:copy-dependencies -DoutputDirectory=$PWD/lib
    python -m tests.golden.debezium.recorder.record lib MARIADB_LINUX_DIRECTORY

A line is `{"topic", "key", "value", "headers"}`; key and value are the bytes of the record as text.
"""

import base64
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import psycopg

from runners.embedded.ports import free_ports
from runners.embedded.postgres import PostgresServer

HERE = pathlib.Path(__file__).parent
QUIET_S = 4.0

POSTGRES_SETUP = """
CREATE SCHEMA his;
CREATE TYPE his.triage AS ENUM ('I', 'II', 'III', 'IV');
CREATE TABLE his.patient(pid bigint PRIMARY KEY, mrn varchar(20) UNIQUE, name varchar(50) NOT NULL,
  sex_code char(1), birth_date date, notes text, updated_at timestamptz);
CREATE TABLE his.result(result_id uuid PRIMARY KEY, mrn varchar(20), val_num numeric(14,4),
  critical boolean, result_at timestamptz);
ALTER TABLE his.result REPLICA IDENTITY FULL;
CREATE TABLE his.kinds(id int PRIMARY KEY, b boolean, i2 smallint, i8 bigint, f4 real, f8 float8,
  n numeric, n2 numeric(14,4), m money, t text, c char(4), v varchar(9), by bytea, d date, ti time,
  ti3 time(3), tz timetz, ts timestamp, ts3 timestamp(3), tsz timestamptz, iv interval, u uuid,
  j json, jb jsonb, bi bit(1), bi4 bit(12), vb varbit(20), e his.triage, ia int[], ta text[],
  inet inet, r int4range);
INSERT INTO his.patient SELECT i, 'M' || i, '测试' || i, '1', '1970-01-01'::date + i, NULL,
  '2026-03-01 08:00:00.123456+08' FROM generate_series(1, 3) i;
"""
KINDS = """INSERT INTO his.kinds VALUES
 (1, true, -32768, 9223372036854775807, 1.5, -2.25e-7, 12345678901234567890.123456789, 6.8000,
  12.34, '血钾 6.8', 'ab', 'vvv', '\\x00ff10', '2026-03-01', '23:59:59.999999', '08:30:00.5',
  '08:30:00.123456+08', '2026-03-01 08:30:00.123456', '2026-03-01 08:30:00.25',
  '2026-03-01 08:30:00.123456+08', '1 year 2 mons 3 days 04:05:06.789',
  '0190a6b2-7c1e-7000-8000-000000000001', '{"a": 1}', '{"b": [1, 2]}', B'1',
  B'101000000001', B'1101', 'II', '{1,NULL,-3}', '{"a,b",NULL,"c\\"d"}', '10.0.0.1', '[1,5)'),
 (2, false, 0, 0, 0, 0, 0, -0.5, 0, '', '', '', '', '0001-01-01', '00:00:00', '00:00:00',
  '00:00:00+00', '0001-01-01 00:00:00', '9999-12-31 23:59:59.999', '9999-12-31 23:59:59.999999+00',
  '00:00:00', '00000000-0000-0000-0000-000000000000', '[]', '{}', B'0', B'000000000000', B'',
  'I', '{}', '{}', '::1', 'empty'),
 (3, NULL, NULL, NULL, 'NaN', 'Infinity', 'NaN', NULL, NULL, NULL, NULL, NULL, NULL, 'infinity',
  NULL, NULL, NULL, 'infinity', '-infinity', 'infinity', '-1 day', NULL, NULL, NULL, NULL, NULL,
  NULL, NULL, NULL, NULL, NULL, NULL)"""
POSTGRES_WORK = [
    [KINDS],
    [
        """INSERT INTO his.patient VALUES (4, 'M4', '䶮𬭎', '2', '2000-02-29',
        (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 80) i), now())""",
        """INSERT INTO his.result VALUES
        ('0190a6b2-7c1e-7000-8000-00000000000a', 'M4', 6.8, true, now())""",
    ],
    ["UPDATE his.patient SET name = '改名' WHERE pid = 4"],
    ["UPDATE his.patient SET pid = 40 WHERE pid = 4"],
    ["UPDATE his.result SET val_num = 7.1 WHERE mrn = 'M4'"],
    ["COPY his.result FROM STDIN"],
    ["UPDATE his.patient SET notes = 'n' WHERE pid < 3", "DELETE FROM his.patient WHERE pid = 3"],
    ["DELETE FROM his.result WHERE mrn = 'M4'"],
    ["SELECT pg_logical_emit_message(true, 'campus', 'hello')"],
    ["TRUNCATE his.result"],
    ["ALTER TABLE his.patient ADD COLUMN phone varchar(30)"],
    ["UPDATE his.patient SET phone = '010' WHERE pid = 1"],
]
COPIED = "".join(
    f"0190a6b2-7c1e-7000-8000-0000000001{i:02}\tM{i}\t{i}.5\tf\t\\N\n" for i in range(5)
)

MARIADB_SETUP = """
CREATE DATABASE his DEFAULT CHARACTER SET gbk;
USE his;
CREATE TABLE MS_BRDA(BRID INT PRIMARY KEY, BRXM VARCHAR(20), BRXB VARCHAR(4), CSNY VARCHAR(10),
  XGSJ DATETIME);
CREATE TABLE kinds(id INT UNSIGNED PRIMARY KEY, b1 BOOLEAN, i1 TINYINT UNSIGNED, i3 MEDIUMINT,
  i8 BIGINT UNSIGNED, f4 FLOAT, f8 DOUBLE, n DECIMAL(14,4), t TEXT, c CHAR(14), vb VARBINARY(20),
  bl BLOB, d DATE, ti TIME(6), dt DATETIME, dt3 DATETIME(3), dt6 DATETIME(6), ts TIMESTAMP(6) NULL,
  y YEAR, e ENUM('I','II'), s SET('a','b','c'), bi BIT(1), bi12 BIT(12), j JSON);
INSERT INTO MS_BRDA VALUES (1, '张三', '男', '2016.3.5', '2026-03-01 08:00:00'),
  (2, '李四', '女', '20160305', NULL);
"""
MARIADB_WORK = [
    [
        """INSERT INTO kinds VALUES (4294967295, true, 255, -8388608, 18446744073709551615, 1.5,
        -2.25e-7, -6.8, '血钾 6.8 乗俓', '20160305081500', x'00ff10', x'00', '2026-03-01',
        '-838:59:59', '2026-03-01 08:30:00', '2026-03-01 08:30:00.25', '9999-12-31 23:59:59.999999',
        '2026-03-01 00:30:00.123456', 2026, 'II', 'a,c', b'1', b'101000000001', '{"a": 1}')""",
        """INSERT INTO kinds (id, n, ti, dt6, y, s, bi12) VALUES
        (0, 0, '00:00:00', '1000-01-01 00:00:00', 0, '', b'0')""",
        "SET sql_mode = ''",
        "INSERT INTO kinds (id, d, dt, ti) VALUES (1, '0000-00-00', '0000-00-00', '838:59:59')",
    ],
    [
        "BEGIN",
        "INSERT INTO MS_BRDA VALUES (3, '王五', '1', '', NOW())",
        "UPDATE MS_BRDA SET BRXM = '王小五' WHERE BRID = 3",
        "COMMIT",
    ],
    ["UPDATE MS_BRDA SET BRID = 30 WHERE BRID = 3"],
    ["DELETE FROM MS_BRDA WHERE BRID = 2"],
    ["ALTER TABLE MS_BRDA ADD COLUMN SFZH VARCHAR(18)"],
    ["UPDATE MS_BRDA SET SFZH = '11010519491231002X' WHERE BRID = 1"],
    ["TRUNCATE TABLE MS_BRDA"],
]
COMMON = {
    "name": "recorder",
    "topic.prefix": "campus",
    "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
    "offset.flush.interval.ms": "1000",
    "provide.transaction.metadata": "true",
    "heartbeat.interval.ms": "3000",
    "skipped.operations": "none",
    "schema.history.internal": "io.debezium.relational.history.MemorySchemaHistory",
}
MODES = {
    "": {},
    "_plain": {
        "converter.schemas.enable": "false",
        "decimal.handling.mode": "string",
        "binary.handling.mode": "hex",
    },
    "_iso": {
        "converter.schemas.enable": "false",
        "time.precision.mode": "isostring",
        "binary.handling.mode": "base64",
        "interval.handling.mode": "string",
    },
    "_connect": {
        "time.precision.mode": "connect",
        "decimal.handling.mode": "double",
    },
    "_nanos": {
        "time.precision.mode": "nanoseconds",
        "bigint.unsigned.handling.mode": "precise",
        "interval.handling.mode": "string",
    },
}


def record(name: str, settings: dict[str, str], libraries: str, work) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        lines = [f"{key}={value}" for key, value in settings.items()]
        (place / "settings").write_text("\n".join(lines))
        out = place / "out"
        path = f"{libraries}/*:{HERE}"
        command = ["java", "-Xmx256m", "-cp", path, "Record", str(place / "settings"), str(out)]
        with (place / "log").open("w") as log:
            process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            wait(out, lambda text: b"last" in text or b'"LAST"' in text, process, place / "log")
            work()
            size = -1
            while data(out) != size:
                size = data(out)
                time.sleep(QUIET_S)
        finally:
            process.kill()
            process.wait()
        events = [event(line) for line in out.read_bytes().splitlines()]
    target = HERE.parent / f"{name}.jsonl"
    target.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events))
    print(name, len(events), target.stat().st_size)


def data(out: pathlib.Path) -> int:
    return sum(1 for line in out.read_bytes().splitlines() if b"heartbeat" not in line)


def wait(out, ready, process, log) -> None:
    until = time.monotonic() + 60
    while True:
        values = []
        if out.exists():
            values = [line.split(b"\t")[2] for line in out.read_bytes().splitlines()]
        if any(ready(base64.b64decode(value)) for value in values if value != b"-"):
            time.sleep(2)
            return
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(log.read_text()[-4000:])
        time.sleep(0.2)


def event(line: bytes) -> dict:
    topic, key, value, *headers = line.decode().split("\t")
    pairs = (header.split("=", 1) for header in headers)
    headers = {name: text(value) for name, value in pairs}
    return {"topic": topic, "key": text(key), "value": text(value), "headers": headers}


def text(field: str) -> str | None:
    return None if field == "-" else base64.b64decode(field).decode()


def record_postgresql(libraries: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pathlib.Path(scratch).chmod(0o755)
        with PostgresServer(f"{scratch}/server", durable=False) as server:
            for mode, settings in MODES.items():
                dsn = server.create_database(f"his{mode}")
                with psycopg.connect(dsn, autocommit=True) as connection:
                    connection.execute(POSTGRES_SETUP)
                record(
                    f"postgresql{mode}",
                    COMMON
                    | {
                        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
                        "database.hostname": "127.0.0.1",
                        "database.port": str(server.port),
                        "database.user": "postgres",
                        "database.password": "none",
                        "database.dbname": f"his{mode}",
                        "plugin.name": "pgoutput",
                        "slot.name": f"recorder{mode}",
                        "publication.name": "recorder",
                        "schema.include.list": "his",
                    }
                    | settings,
                    libraries,
                    lambda dsn=dsn: work_postgresql(dsn),
                )


def work_postgresql(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        for statements in POSTGRES_WORK:
            with connection.transaction():
                for statement in statements:
                    if statement.startswith("COPY"):
                        with connection.cursor().copy(statement) as copy:
                            copy.write(COPIED)
                    else:
                        connection.execute(statement)


def record_mariadb(libraries: str, programs: pathlib.Path) -> None:
    for mode, settings in MODES.items():
        with tempfile.TemporaryDirectory() as scratch:
            port = str(next(free_ports("127.0.0.1", scratch.encode())))
            base = [str(programs / "bin/mariadbd"), "--no-defaults", "--user=root"]
            base += [f"--datadir={scratch}/data", f"--lc-messages-dir={programs}/share"]
            pathlib.Path(scratch, "data").mkdir()
            boot = "".join(
                (programs / "share" / name).read_text()
                for name in ("mariadb_system_tables.sql", "mariadb_system_tables_data.sql")
            )
            subprocess.run(
                [*base, "--bootstrap"],
                input=f"CREATE DATABASE mysql;\nUSE mysql;\n{boot}",
                text=True,
                check=True,
                capture_output=True,
            )
            more = ["--log-bin", "--binlog-format=ROW", "--binlog-row-metadata=FULL"]
            more += [
                "--server-id=7",
                f"--port={port}",
                f"--socket={scratch}/s",
                "--skip-grant-tables",
            ]
            server = subprocess.Popen([*base, *more], stderr=subprocess.DEVNULL)
            try:
                client = [str(programs / "bin/mariadb"), "--no-defaults", f"--socket={scratch}/s"]
                client += ["--default-character-set=utf8mb4"]
                while subprocess.run([*client, "-e", ""], capture_output=True).returncode:
                    time.sleep(0.2)
                run_sql(client, MARIADB_SETUP)
                record(
                    f"mariadb{mode}",
                    COMMON
                    | {
                        "connector.class": "io.debezium.connector.mariadb.MariaDbConnector",
                        "database.hostname": "127.0.0.1",
                        "database.port": port,
                        "database.user": "root",
                        "database.password": "none",
                        "database.server.id": "99",
                        "database.include.list": "his",
                        "database.ssl.mode": "disable",
                    }
                    | settings,
                    libraries,
                    lambda client=client: [
                        run_sql(client, "USE his; " + "; ".join(some)) for some in MARIADB_WORK
                    ],
                )
            finally:
                server.kill()
                server.wait()


def run_sql(client: list[str], text: str) -> None:
    subprocess.run(client, input=text, text=True, check=True)


if __name__ == "__main__":
    subprocess.run(["javac", "-cp", f"{sys.argv[1]}/*", str(HERE / "Record.java")], check=True)
    record_postgresql(sys.argv[1])
    record_mariadb(sys.argv[1], pathlib.Path(sys.argv[2]))
    (HERE / "Record.class").unlink()
