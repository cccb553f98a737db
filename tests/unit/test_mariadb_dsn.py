"""Connection strings: their parts, and that nothing of a wrong one is told."""

import pytest

from schemas.errors import ConfigError
from transforms.capture.mariadb.dsn import parse_dsn


def test_all_parts():
    server = parse_dsn("mariadb://sy%40nc:p%2F%40%3Aw@db.example:3307/his?ssl_ca=/etc/ca.pem")
    assert (server.host, server.port, server.user) == ("db.example", 3307, "sy@nc")
    assert (server.database, server.secret(), server.ssl_ca) == ("his", "p/@:w", "/etc/ca.pem")
    assert server.place == "db.example:3307/his"


def test_defaults():
    server = parse_dsn("mysql://sync@127.0.0.1/his")
    assert (server.port, server.secret(), server.ssl_ca) == (3306, "", "")


def test_a_password_may_stand_in_a_file(tmp_path):
    (tmp_path / "secret").write_text("s3cret\n")
    server = parse_dsn(f"mariadb://sync@h/his?password_file={tmp_path}/secret")
    assert server.secret() == "s3cret"
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        parse_dsn(f"mariadb://sync@h/his?password_file={tmp_path}/none").secret()


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "mariadb://",
        "postgresql://sync:s3cret@h/his",
        "mariadb://sync:s3cret@h",
        "mariadb://:s3cret@h/his",
        "mariadb://sync:s3cret@/his",
        "mariadb://sync:s3cret@h:port/his",
        "mariadb://sync:s3cret@h:99999/his",
        "mariadb://sync:s3cret@h/his/more",
        "mariadb://sync:s3cret@h/his?charset=gbk",
        "mariadb://sync:s3cret@h/his?ssl_ca",
        "mariadb://sync:s3cret@h/his?password_file=/x",
        "mariadb://sync:s3cret/@h/his",
        "mariadb://sync:s3cret#@h/his",
        "mariadb://sync:s3cret@[h/his",
    ],
)
def test_other_forms_are_refused_and_quote_nothing(dsn):
    with pytest.raises(ConfigError) as caught:
        parse_dsn(dsn)
    assert "MariaDB" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_the_password_does_not_show():
    assert "s3cret" not in repr(parse_dsn("mariadb://sync:s3cret@h/his"))
