"""Read a connection string in one place; what it keeps secret never shows in a text of ours."""

import dataclasses
import pathlib
import urllib.parse

from schemas.errors import ConfigError

_SCHEMES = ("mariadb", "mysql")
_PORT = 3306
_FORM = "mariadb://user:password@host:port/database"
_OPTIONS = {"password_file", "ssl_ca"}


@dataclasses.dataclass(frozen=True)
class Server:
    """Where a source is and who reads it.

    Attributes:
      password: "" if there is none, or if it stands in `password_file`.
      password_file: path of a file that holds nothing else; read at each connection.
      ssl_ca: path of certificates that the server's must be signed by; "" takes what
        encryption the server offers and does not ask who it is.
    """

    host: str
    port: int
    user: str
    database: str
    password: str = dataclasses.field(default="", repr=False)
    password_file: str = ""
    ssl_ca: str = ""

    @property
    def place(self) -> str:
        """Names the source in errors and logs."""
        return f"{self.host}:{self.port}/{self.database}"

    def secret(self) -> str:
        """Returns the password.

        Raises:
          ConfigError: its file cannot be read.
        """
        if not self.password_file:
            return self.password
        try:
            return pathlib.Path(self.password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"source {self.place}: password file {self.password_file} cannot be read: "
                f"{type(error).__name__}."
            ) from error


def parse_dsn(dsn: str) -> Server:
    """Returns what `mariadb://user:password@host:port/database?password_file=..&ssl_ca=..` says.

    Parts may be percent-encoded. `mysql://` means the same.

    Raises:
      ConfigError: it is of another form; the text quotes none of it.
    """
    try:
        parts = urllib.parse.urlsplit(dsn)
        port = parts.port or _PORT
        options = dict(urllib.parse.parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:  # Its text may hold the password.
        raise ConfigError(f"a MariaDB connection string must be of the form {_FORM}.") from None
    database = urllib.parse.unquote(parts.path.removeprefix("/"))
    user = urllib.parse.unquote(parts.username or "")
    if parts.scheme not in _SCHEMES or not (parts.hostname and user and database):
        raise ConfigError(f"a MariaDB connection string must be of the form {_FORM}.")
    if "/" in database or parts.fragment or not options.keys() <= _OPTIONS:
        raise ConfigError(
            f"a MariaDB connection string must be of the form {_FORM}, with "
            f"{' and '.join(sorted(_OPTIONS))} as its only options; encode special characters of "
            "a password with %."
        )
    password = urllib.parse.unquote(parts.password or "")
    if password and "password_file" in options:
        raise ConfigError("give a MariaDB source a password or a password_file, not both.")
    return Server(parts.hostname, port, user, database, password, **options)
