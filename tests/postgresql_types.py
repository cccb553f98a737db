"""Every type of a PostgreSQL column with values and the text that each must become."""

from tests.mariadb_types import TypeCase, numbers, same

CASES = [
    TypeCase("boolean", [("true", "t"), ("false", "f")]),
    TypeCase("smallint", numbers("-32768", "0", "32767")),
    TypeCase("integer", numbers("-2147483648", "0", "2147483647")),
    TypeCase("bigint", numbers("-9223372036854775808", "0", "9223372036854775807")),
    TypeCase(
        "numeric",
        [
            *numbers("0", "0.0010", "-12345678901234567890.123456789"),
            ("1e-20", "0." + "0" * 19 + "1"),
            ("1e40", "1" + "0" * 40),
            *same("NaN", "Infinity", "-Infinity"),
        ],
    ),
    TypeCase("numeric(12,4)", [("1.5", "1.5000"), ("-99999999.9999", "-99999999.9999")]),
    TypeCase(
        "real", [("0.1", "0.1"), ("3.4028235e38", "3.4028235e+38"), *same("NaN", "-Infinity")]
    ),
    TypeCase(
        "double precision",
        [
            ("0.1::float8 + 0.2", "0.30000000000000004"),
            ("1.7976931348623157e308", "1.7976931348623157e+308"),
            ("5e-324", "5e-324"),
            ("1e15", "1e+15"),
            *same("NaN", "Infinity"),
        ],
    ),
    TypeCase("money", [("'-1234.50'", "-$1,234.50")]),
    TypeCase(
        "text",
        [
            *same("", " 前后 ", "䶮𬭎²³µ•€\U0001f691", "\\N"),
            ("E'tab\\tnewline\\nreturn\\r\\b\\f\\v\\x01'", "tab\tnewline\nreturn\r\b\f\v\x01"),
            ("repeat('长', 70000)", "长" * 70_000),
        ],
    ),
    TypeCase("varchar(20)", same("", "阴性(-)", "血钾↑")),
    TypeCase("char(8)", [("'ab'", "ab      "), ("''", " " * 8), ("'男'", "男       ")]),
    TypeCase("date", same("2024-02-29", "0001-01-01", "9999-12-31", "infinity", "-infinity")),
    TypeCase("date", [("'0044-03-15 BC'", "0044-03-15 BC"), ("'294000-01-01'", "294000-01-01")]),
    TypeCase("time", same("00:00:00", "23:59:59.999999", "24:00:00")),
    TypeCase("timetz", [("'04:05:06.789+08:30'", "04:05:06.789+08:30")]),
    TypeCase(
        "timestamp",
        [
            *same("2024-01-01 12:00:00", "0001-01-01 00:00:00", "9999-12-31 23:59:59.999999"),
            *same("infinity", "-infinity", "0001-01-01 00:00:00 BC", "294000-01-01 00:00:00"),
        ],
    ),
    TypeCase(
        "timestamptz",
        [
            ("'2024-01-01 12:00:00.000001+08'", "2024-01-01 04:00:00.000001+00"),
            ("'1900-01-01 00:00:00+08:05:43'", "1899-12-31 15:54:17+00"),
            ("'0001-01-01 00:00:00+00'", "0001-01-01 00:00:00+00"),
            ("'10000-01-01 00:00:00+08'", "9999-12-31 16:00:00+00"),
            ("'10000-01-01 08:00:00+08'", "10000-01-01 00:00:00+00"),
            *same("infinity", "-infinity"),
        ],
    ),
    TypeCase("interval", [("'1 year -2 mons +3 days -04:05:06.7'", "10 mons 3 days -04:05:06.7")]),
    TypeCase("uuid", same("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
    TypeCase("bytea", [(r"'\x00ff5c0a'", r"\x00ff5c0a"), (r"'\x'", r"\x")]),
    TypeCase("json", same('{"a":  1}')),
    TypeCase("jsonb", [("""'{"b": [1, null, "\\u4f1a"]}'""", '{"b": [1, null, "会"]}')]),
    TypeCase("inet", same("10.0.0.1", "10.0.0.1/8", "::1")),
    TypeCase("macaddr", same("08:00:2b:01:02:03")),
    TypeCase("bit(4)", [("B'1010'", "1010")]),
    TypeCase("point", same("(1.5,-2)")),
    TypeCase("int4range", same("[1,5)", "empty")),
    TypeCase("text[]", [("ARRAY['a', NULL, 'NULL', '', ',']", '{a,NULL,"NULL","",","}')]),
    TypeCase("mood", same("急")),
    TypeCase("yes", [("true", "t")]),
    TypeCase("pair", [("(1, 'a,\"b')", '(1,"a,""b")')]),
]
