"""Made-up Oracle (LogMiner) and SQL Server events; `python -m tests.debezium_made_up` writes them.

The rows are drawn with a seed: the same files come out on every machine.
"""

import random

from tests.debezium_events import (
    COMMIT_MS,
    GOLDEN,
    PLACEHOLDER,
    Topic,
    decimal_field,
    field,
    save,
    unscaled,
    variable_field,
)

SEED = 20260301
_STAMP = "io.debezium.time.Timestamp"
_MICRO = "io.debezium.time.MicroTimestamp"
PATIENT, MASTER, RESULT = "LAB.PAT_MASTER_INDEX", "LAB.LAB_TEST_MASTER", "LAB.LAB_RESULT"
NUMBERS = "LAB.NUMBERS"
ORACLE_KEYS = {
    PATIENT: ("PATIENT_ID",),
    MASTER: ("TEST_NO",),
    RESULT: ("TEST_NO", "ITEM_NO", "PRINT_ORDER"),
    NUMBERS: ("ID",),
}
ORACLE_FIELDS = {
    PATIENT: [
        field("PATIENT_ID", "string", optional=False),
        *(field(name, "string") for name in ("INP_NO", "NAME", "SEX")),
        field("DATE_OF_BIRTH", "int64", _STAMP),
        *(field(name, "string") for name in ("ID_NO", "BLOOD_TYPE")),
    ],
    MASTER: [
        field("TEST_NO", "string", optional=False),
        field("PATIENT_ID", "string"),
        field("VISIT_ID", "int8"),
        field("SPECIMEN", "string"),
        field("REQUESTED_DATE_TIME", "int64", _STAMP),
        field("RESULTS_RPT_DATE_TIME", "int64", _MICRO),
        decimal_field("COSTS", 2),
        variable_field("CHARGES"),
        field("NOTES", "string"),
    ],
    RESULT: [
        field("TEST_NO", "string", optional=False),
        field("ITEM_NO", "int64", optional=False),
        field("PRINT_ORDER", "int16", optional=False),
        *(field(name, "string") for name in ("REPORT_ITEM_CODE", "REPORT_ITEM_NAME")),
        *(field(name, "string") for name in ("RESULT", "UNITS", "ABNORMAL_INDICATOR")),
        field("RESULT_DATE_TIME", "int64", _STAMP),
    ],
    NUMBERS: [
        variable_field("ID") | {"optional": False},
        variable_field("N"),
        field("BF", "float"),
        field("BD", "double"),
        field("TZ", "string", "io.debezium.time.ZonedTimestamp"),
        field("TS9", "int64", "io.debezium.time.NanoTimestamp"),
        field("IV", "int64", "io.debezium.time.MicroDuration"),
        field("RW", "bytes"),
    ],
}
_NAMES = ("张三", "李四", "王小五", "欧阳䶮", "赵𬭎")
_ITEMS = (("K", "血钾", "mmol/L", "6.8", "H"), ("CREA", "肌酐", "µmol/L", "<1.0", "N"))
_ITEMS += (
    ("HBSAG", "乙肝表面抗原", None, "阴性(-)", None),
    ("GLU", "葡萄糖", "mmol/L", "见报告", None),
)


def _plain_numbers(row: dict | None) -> dict | None:
    """As `decimal.handling.mode=string` without schema writes what has no fixed integer type."""
    if row is None:
        return None
    texts = {"CHARGES": "120.5", "COSTS": "35.00", "N": "-12345678901234567890.5"}
    changed = {name: texts[name] for name in texts.keys() & row.keys() if row[name] is not None}
    numbers = {n: str(row[n]) for n in ("ITEM_NO", "PRINT_ORDER", "VISIT_ID") if n in row}
    if isinstance(row.get("ID"), dict):
        numbers["ID"] = "1"
    return row | changed | numbers


class _Oracle:
    """LogMiner's view: transactions of two redo threads, each with its own commit order."""

    def __init__(self, schemas: bool):
        self._random = random.Random(SEED)
        self.topic = Topic("oracle", ORACLE_FIELDS, ORACLE_KEYS, schemas)
        self._scn = 2_868_546
        self._step = 0
        self._commit: dict = {}

    def snapshot(self, tables: dict[str, list[dict]]) -> None:
        source = {"scn": str(self._scn), "txId": None}
        last_table = list(tables)[-1]
        for table, rows in tables.items():
            for i, row in enumerate(rows):
                marker = "true"
                if i == 0:
                    marker = "first" if table == next(iter(tables)) else "first_in_data_collection"
                if i == len(rows) - 1:
                    marker = "last" if table == last_table else "last_in_data_collection"
                self._change("r", table, None, row, source | {"snapshot": marker})

    def begin(self, thread: int, commit_scn: int, number: int) -> str:
        name = f"{number:02x}000a00{number:04x}0000"
        self._commit = {
            "txId": name,
            "redo_thread": thread,
            "commit_scn": str(commit_scn),
            "commit_ts_ms": COMMIT_MS + commit_scn,
            "start_scn": str(commit_scn - 30),
            "start_ts_ms": COMMIT_MS,
            "user_name": "LAB",
        }
        self._step = 0
        self.topic.boundary("BEGIN", name)
        return name

    def change(self, op: str, table: str, before, after, headers=None, key=None) -> None:
        self._scn += self._random.randrange(0, 3)
        self._step += 1
        source = self._commit | {
            "scn": str(self._scn),
            "rs_id": f" 0x{self._scn % 4096:06x}.{self._scn:08x}.0010 ",
            "ssn": 0,
            "row_id": f"AAAWi{self._random.randrange(16**4):04X}AAMAAABkLAAA",
            "txSeq": self._step,
        }
        self._change(op, table, before, after, source, headers, key)

    def end(self, counts: dict[str, int]) -> None:
        full = {f"ORCLPDB1.{table}": count for table, count in counts.items()}
        self.topic.boundary("END", self._commit["txId"], full)

    def _change(self, op, table, before, after, source, headers=None, key=None) -> None:
        if not self.topic.schemas:
            before, after, key = map(_plain_numbers, (before, after, key))
        block = (source["txId"], self._step) if source.get("txSeq") else None
        self.topic.change(op, table, before, after, source, block, headers, key)


def patient(number: int, chance: random.Random) -> dict:
    born = -chance.randrange(0, 25_000) * 86_400_000
    values = {"PATIENT_ID": f"P{number:06}", "INP_NO": None, "NAME": chance.choice(_NAMES)}
    values |= {"SEX": chance.choice(("男", "M", "女")), "DATE_OF_BIRTH": born}
    return values | {"ID_NO": "11010519491231002X", "BLOOD_TYPE": chance.choice(("A", None))}


def master(number: int) -> dict:
    ms = COMMIT_MS + number * 60_000
    values = {"TEST_NO": f"T{number:06}", "PATIENT_ID": f"P{number:06}", "VISIT_ID": 1}
    values |= {
        "SPECIMEN": "血清",
        "REQUESTED_DATE_TIME": ms,
        "RESULTS_RPT_DATE_TIME": ms * 1000 + 5,
    }
    values |= {"COSTS": unscaled(3500), "CHARGES": {"scale": 1, "value": unscaled(1205)}}
    return values | {"NOTES": PLACEHOLDER}


def result(number: int, item: int) -> dict:
    code, name, unit, text, flag = _ITEMS[item % len(_ITEMS)]
    values = {"TEST_NO": f"T{number:06}", "ITEM_NO": item + 1, "PRINT_ORDER": item + 1}
    values |= {"REPORT_ITEM_CODE": code, "REPORT_ITEM_NAME": name, "RESULT": text, "UNITS": unit}
    return values | {"ABNORMAL_INDICATOR": flag, "RESULT_DATE_TIME": COMMIT_MS + item * 1000}


def oracle(schemas: bool) -> Topic:
    """Returns the campus's C tables: a snapshot, and what happens to them after it."""
    chance = random.Random(SEED)
    made = _Oracle(schemas)
    topic = made.topic
    patients = [patient(i, chance) for i in range(3)]
    results = [result(0, item) for item in range(4)]
    made.snapshot({PATIENT: patients, MASTER: [master(0)], RESULT: results})
    topic.heartbeat(COMMIT_MS + 1000)
    made.begin(1, 2_868_600, 1)
    made.change("c", MASTER, None, master(1))
    for item in range(3):
        made.change("c", RESULT, None, result(1, item))
    changed = result(1, 0) | {"RESULT": "6.9"}
    made.change("u", RESULT, result(1, 0), changed)
    made.end({MASTER: 1, RESULT: 4})
    # The other node commits later and is read later, with a lower SCN (RAC).
    made.begin(2, 2_868_590, 2)
    renamed = patients[0] | {"NAME": "改名"}
    made.change("u", PATIENT, patients[0], renamed)
    made.end({PATIENT: 1})
    # Two transactions with one commit SCN.
    for number in (4, 3):
        made.begin(1, 2_868_610, number)
        made.change("c", PATIENT, None, patient(10 + number, chance))
        made.end({PATIENT: 1})
    made.begin(1, 2_868_620, 5)
    old, new = {"PATIENT_ID": "P000001"}, {"PATIENT_ID": "P900001"}
    newkey, oldkey = {"__debezium.newkey": new}, {"__debezium.oldkey": old}
    made.change("d", PATIENT, patients[1], None, newkey)
    topic.tombstone(PATIENT, old)
    made.change("c", PATIENT, None, patients[1] | new, oldkey)
    made.change("d", RESULT, result(0, 3), None)
    made.end({PATIENT: 2, RESULT: 1})
    topic.schema_change(PATIENT, "ALTER TABLE LAB.PAT_MASTER_INDEX ADD (PHONE VARCHAR2(30))")
    made.begin(1, 2_868_630, 6)
    made.change("c", NUMBERS, None, NUMBER_ROW)
    made.end({NUMBERS: 1})
    topic.heartbeat(COMMIT_MS + 4000)
    return topic


NUMBER_ROW = {
    "ID": {"scale": 0, "value": unscaled(1)},
    "N": {"scale": 1, "value": unscaled(-123456789012345678905)},
    "BF": 1.5,
    "BD": -2.25e-7,
    "TZ": "2026-03-01T08:30:00.123456+08:00",
    "TS9": 1_772_353_800_123_456_789,
    "IV": 97_445_000_000,
    "RW": "AP8Q",
}
EXAM = "dbo.EXAM"
SQLSERVER_FIELDS = {
    EXAM: [
        field("EXAM_ID", "int32", optional=False),
        field("ROW_GUID", "string"),
        field("NAME", "string"),
        decimal_field("VALUE", 4),
        decimal_field("PRICE", 4),
        field("URGENT", "boolean"),
        field("DAY", "int32", "io.debezium.time.Date"),
        field("AT_TIME", "int64", "io.debezium.time.NanoTime"),
        field("STARTED", "int64", _STAMP),
        field("ENDED", "int64", "io.debezium.time.NanoTimestamp"),
        field("REPORTED", "string", "io.debezium.time.ZonedTimestamp"),
        field("IMAGE", "bytes"),
    ]
}
SQLSERVER_KEYS = {EXAM: ("EXAM_ID",)}


def exam(number: int) -> dict:
    values = {"EXAM_ID": number, "ROW_GUID": f"6F9619FF-8B86-D011-B42D-00C04FC9{number:04X}"}
    values |= {"NAME": "胸部CT", "VALUE": unscaled(-68000), "PRICE": unscaled(1_234_500)}
    values |= {"URGENT": number % 2 == 0, "DAY": 20_513, "AT_TIME": 30_600_123_456_700}
    values |= {"STARTED": COMMIT_MS + 250, "ENDED": (COMMIT_MS + 999) * 1_000_000 + 456_700}
    return values | {"REPORTED": "2026-03-01T08:30:00.1234567+08:00", "IMAGE": "AP8Q"}


def sqlserver(schemas: bool) -> Topic:
    """Returns one table: a snapshot, and commits whose change LSNs go back within one."""
    topic = Topic("sqlserver", SQLSERVER_FIELDS, SQLSERVER_KEYS, schemas)

    def put(op, before, after, commit, change, serial=1, block=None, **more):
        source = {"commit_lsn": f"00000027:00000{commit:03x}:0005"}
        source |= {"change_lsn": f"00000027:00000{change:03x}:0003", "event_serial_no": serial}
        topic.change(op, EXAM, before, after, source | more, block)

    for i, marker in enumerate(("first", "true", "last")):
        source = {"snapshot": marker, "commit_lsn": "00000027:00000700:0001"}
        topic.change("r", EXAM, None, exam(i), source)
    name = "00000027:00000758:0005"
    topic.boundary("BEGIN", name)
    put("c", None, exam(10), 0x758, 0x757, block=(name, 1))
    put("u", exam(0), exam(0) | {"NAME": "头部CT"}, 0x758, 0x756, 2, (name, 2))
    topic.boundary("END", name, {f"his.{EXAM}": 2})
    # A key change is a delete and an insert at one place.
    name = "00000027:00000768:0005"
    topic.boundary("BEGIN", name)
    put("d", exam(1), None, 0x768, 0x766, 1, (name, 1))
    topic.tombstone(EXAM, {"EXAM_ID": 1})
    put("c", None, exam(1) | {"EXAM_ID": 100}, 0x768, 0x766, 2, (name, 2))
    topic.boundary("END", name, {f"his.{EXAM}": 2})
    topic.schema_change(EXAM, "")
    topic.heartbeat(COMMIT_MS + 3000)
    return topic


FILES = {
    "oracle": lambda: oracle(True),
    "oracle_plain": lambda: oracle(False),
    "sqlserver": lambda: sqlserver(True),
    "sqlserver_plain": lambda: sqlserver(False),
}

if __name__ == "__main__":
    for file, make in FILES.items():
        path = GOLDEN / f"{file}.jsonl"
        path.write_text(save(file, make().records), encoding="utf-8")
        print(file, path.stat().st_size)
