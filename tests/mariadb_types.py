"""Every type of a MariaDB column with values and the text that each must become."""

from typing import NamedTuple

NULL = ("NULL", None)


class TypeCase(NamedTuple):
    """A column's type, and pairs of a value in SQL and its canonical text."""

    type: str
    values: list[tuple[str, str | None]]


def same(*values: str) -> list[tuple[str, str]]:
    """Values whose SQL in quotes is their text."""
    return [(f"'{value}'", value) for value in values]


def numbers(*values: str) -> list[tuple[str, str]]:
    return [(value, value) for value in values]


INTEGERS = [
    TypeCase(f"{name} {sign}".strip(), numbers("0", "1", *(limits if not sign else [top])))
    for name, limits, top in [
        ("TINYINT", ["-128", "127", "-1"], "255"),
        ("SMALLINT", ["-32768", "32767", "-1"], "65535"),
        ("MEDIUMINT", ["-8388608", "8388607", "-1"], "16777215"),
        ("INT", ["-2147483648", "2147483647", "-1"], "4294967295"),
        (
            "BIGINT",
            ["-9223372036854775808", "9223372036854775807", "-1"],
            "18446744073709551615",
        ),
    ]
    for sign in ("", "UNSIGNED")
]
CASES = [
    *INTEGERS,
    TypeCase("BIGINT UNSIGNED", numbers("9223372036854775808")),
    TypeCase("INT(6) ZEROFILL", [("42", "42")]),
    TypeCase("BOOLEAN", [("TRUE", "1"), ("FALSE", "0")]),
    TypeCase(
        "DECIMAL(65,30)",
        [
            ("0", "0." + "0" * 30),
            ("-" + "9" * 35 + "." + "9" * 30, "-" + "9" * 35 + "." + "9" * 30),
            ("0." + "0" * 29 + "1", "0." + "0" * 29 + "1"),
            ("1234567890123456789.5", "1234567890123456789.5" + "0" * 29),
        ],
    ),
    TypeCase(
        "DECIMAL(14,4)",
        [("-0.0001", "-0.0001"), ("6.8", "6.8000"), ("1000000000", "1000000000.0000")],
    ),
    TypeCase("DECIMAL(10,0)", numbers("-5", "0", "9999999999")),
    TypeCase("DECIMAL(2,2)", numbers("0.99", "-0.01")),
    TypeCase("DECIMAL(9,9)", numbers("0.123456789")),
    TypeCase("DECIMAL(10,4) ZEROFILL", [("1.5", "1.5000")]),
    TypeCase(
        "FLOAT", [("0.1", "0.1"), ("3.4028235e38", "3.4028235e+38"), ("-1", "-1"), ("0", "0")]
    ),
    TypeCase(
        "DOUBLE",
        [
            ("0.1", "0.1"),
            ("0.1e0 + 0.2e0", "0.30000000000000004"),
            ("1.7976931348623157e308", "1.7976931348623157e+308"),
            ("5e-324", "5e-324"),
            ("1e15", "1e+15"),
        ],
    ),
    TypeCase("BIT(1)", [("b'1'", "1"), ("b'0'", "0")]),
    TypeCase("BIT(10)", [("b'1000000011'", "515")]),
    TypeCase("BIT(64)", [("0xFFFFFFFFFFFFFFFF", "18446744073709551615"), ("0", "0")]),
    TypeCase("YEAR", [("2024", "2024"), ("1901", "1901"), ("2155", "2155"), ("0", "0000")]),
    TypeCase("DATE", same("2016-03-05", "0001-01-01", "9999-12-31", "0000-00-00", "2016-03-00")),
    TypeCase(
        "DATETIME",
        same(
            "2016-03-05 08:15:00",
            "0000-00-00 00:00:00",
            "9999-12-31 23:59:59",
            "2016-00-00 00:00:00",
        ),
    ),
    TypeCase("DATETIME(1)", same("2016-03-05 08:15:00.1", "0000-00-00 00:00:00.0")),
    TypeCase("DATETIME(2)", same("2016-03-05 08:15:00.12")),
    TypeCase("DATETIME(3)", same("2016-03-05 08:15:00.120", "2016-03-05 08:15:00.001")),
    TypeCase("DATETIME(4)", same("2016-03-05 08:15:00.1234")),
    TypeCase("DATETIME(5)", same("2016-03-05 08:15:00.00005")),
    TypeCase("DATETIME(6)", same("2016-03-05 08:15:00.999999", "0001-01-01 00:00:00.000001")),
    TypeCase(
        "TIMESTAMP NULL",
        [
            ("'2016-03-05 08:15:00'", "2016-03-05 00:15:00+00"),  # Written in +08:00.
            ("'1970-01-01 08:00:01'", "1970-01-01 00:00:01+00"),
            ("'2038-01-19 11:14:07'", "2038-01-19 03:14:07+00"),
            ("'2000-02-29 23:59:59'", "2000-02-29 15:59:59+00"),
            ("'0000-00-00 00:00:00'", "0000-00-00 00:00:00"),
        ],
    ),
    TypeCase("TIMESTAMP(3) NULL", [("'2016-03-05 08:15:00.5'", "2016-03-05 00:15:00.500+00")]),
    TypeCase(
        "TIMESTAMP(6) NULL",
        [
            ("'2016-03-05 08:15:00.000001'", "2016-03-05 00:15:00.000001+00"),
            ("'0000-00-00 00:00:00'", "0000-00-00 00:00:00.000000"),
        ],
    ),
    TypeCase("TIME", same("00:00:00", "08:15:00", "-838:59:59", "838:59:59", "-00:00:01")),
    TypeCase("TIME(1)", same("-00:00:00.1", "25:00:00.9")),
    TypeCase("TIME(2)", same("-00:00:00.01", "-01:00:00.99")),
    TypeCase("TIME(3)", same("-00:00:00.001", "-99:59:59.999")),
    TypeCase("TIME(4)", same("-12:00:00.0001")),
    TypeCase("TIME(6)", same("-00:00:00.000001", "838:59:59.999999", "-838:59:58.500000")),
    TypeCase(
        "VARCHAR(40) CHARACTER SET gbk",
        same("", "张三", "乗俓匼", "血钾↑", "NG", "啊" * 40, "μ×", " 前后 "),
    ),
    TypeCase("VARCHAR(300) CHARACTER SET gbk", same("", "阴性(-)", "丂" * 300)),
    TypeCase("CHAR(8) CHARACTER SET gbk", [("'男'", "男"), ("'ab  '", "ab"), ("''", "")]),
    TypeCase("CHAR(200) CHARACTER SET gbk", same("诊" * 200)),
    TypeCase("TEXT CHARACTER SET gbk", same("", "见报告\n溶血", "中" * 300)),
    TypeCase("VARCHAR(20) CHARACTER SET gb2312", same("会诊")),
    TypeCase("VARCHAR(20) CHARACTER SET utf8mb4", same("䶮𬭎²³µ•€", "\U0001f691")),
    TypeCase("CHAR(4) CHARACTER SET utf8mb4", same("䶮𬭎", "a")),
    TypeCase("VARCHAR(20) CHARACTER SET utf8mb3", same("会诊µ")),
    TypeCase("VARCHAR(20) CHARACTER SET latin1", same("µ²é€", "ÿ")),
    TypeCase("VARCHAR(20) CHARACTER SET ascii", same("K+")),
    TypeCase("VARCHAR(20) CHARACTER SET big5", same("會診")),
    TypeCase("VARCHAR(20) CHARACTER SET ucs2", same("会诊")),
    TypeCase("VARCHAR(20) CHARACTER SET utf16", same("会\U0001f691")),
    TypeCase("VARCHAR(20) CHARACTER SET utf32", same("会诊")),
    TypeCase("VARCHAR(20) CHARACTER SET cp1251", same("Врач")),
    TypeCase("VARCHAR(20) CHARACTER SET sjis", same("ｱ診察")),
    TypeCase("LONGTEXT CHARACTER SET utf8mb4", same("长" * 70_000)),
    TypeCase(
        "ENUM('甲','乙','丙') CHARACTER SET gbk", [("'乙'", "乙"), ("'丙'", "丙"), ("'丁'", "")]
    ),
    TypeCase(
        "SET('甲','乙','丙') CHARACTER SET gbk",
        [("'丙,甲'", "甲,丙"), ("''", ""), ("'甲,乙,丙'", "甲,乙,丙")],
    ),
    TypeCase("SET(" + ",".join(f"'s{i}'" for i in range(64)) + ")", [("'s63,s0'", "s0,s63")]),
    TypeCase("ENUM(" + ",".join(f"'e{i}'" for i in range(300)) + ")", [("'e299'", "e299")]),
    TypeCase("JSON", same('{"K": 6.8, "名": "张"}', "[]")),
    TypeCase("BINARY(6)", [("X'00FF5C0A'", "00ff5c0a0000"), ("X'000000000000'", "000000000000")]),
    TypeCase("VARBINARY(300)", [("X'00FF5C00'", "00ff5c00"), ("''", "")]),
    TypeCase("BLOB", [("X'D5C5'", "d5c5"), ("''", ""), ("REPEAT(X'00', 300)", "00" * 300)]),
    TypeCase("LONGBLOB", [("X'FF'", "ff")]),
    TypeCase("POINT", [("POINT(1, 2)", "000000000101000000000000000000f03f0000000000000040")]),
    TypeCase(
        "UUID",
        [
            ("'123e4567-e89b-12d3-a456-426655440000'", "123e4567e89b12d3a456426655440000"),
            ("'0190a6b2-7c1e-7000-8000-000000000001'", "0190a6b27c1e70008000000000000001"),
        ],
    ),
    TypeCase("INET4", [("'10.0.0.1'", "0a000001")]),
    TypeCase("INET6", [("'::1'", "0" * 31 + "1")]),
]
