"""Tell what a logged statement means for tables whose rows we follow."""

import dataclasses
import re
from collections.abc import Collection, Mapping

from transforms.capture.mariadb import charsets
from transforms.capture.mariadb.charsets import COPIED

# One name, or a name after its database; quoted or not.
_NAME = r"(?:`(?:[^`]|``)+`|[\w$\u0080-\uffff]+)"
_TABLE = rf"(?:{_NAME}\s*\.\s*)?{_NAME}"
_COMMENT = re.compile(r"/\*(?![!M]).*?\*/|--[ \t][^\n]*|#[^\n]*", re.DOTALL)
_EXECUTED = re.compile(r"/\*M?!\d*|\*/")  # Comments that the server reads.
_TABLES = re.compile(_TABLE)
_FIRST_WORD = re.compile(r"[\s(]*(\w+)")
# Statements that change rows and were logged as text, not as rows.
_ROW_WORDS = {"insert", "update", "delete", "replace", "load", "with", "call", "merge"}
_TRUNCATE = re.compile(r"\s*truncate\s+(?:table\s+)?", re.IGNORECASE)
_DROP = re.compile(
    r"\s*drop\s+(?:temporary\s+)?table\s+(?:if\s+exists\s+)?(?P<tables>.*)",
    re.IGNORECASE | re.DOTALL,
)
_DROP_DATABASE = re.compile(
    rf"\s*drop\s+(?:database|schema)\s+(?:if\s+exists\s+)?(?P<name>{_NAME})", re.IGNORECASE
)
_RENAME = re.compile(r"\s*rename\s+tables?\s+(?:if\s+exists\s+)?(?P<pairs>.*)", re.I | re.DOTALL)
_REPLACE = re.compile(
    rf"\s*create\s+or\s+replace\s+table\s+(?:if\s+not\s+exists\s+)?(?P<table>{_TABLE})",
    re.IGNORECASE,
)
_ALTER = re.compile(
    rf"\s*alter\s+(?:online\s+)?(?:ignore\s+)?table\s+(?:if\s+exists\s+)?(?P<table>{_TABLE})"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_MOVES_ROWS = re.compile(
    r"\b(?:(?:drop|truncate|exchange|import|discard)\s+(?:partition|tablespace)"
    r"|convert\s+partition)\b",
    re.IGNORECASE,
)
_ALTER_RENAME = re.compile(
    rf"\brename\s+(?!column\b|index\b|key\b)(?:to\s+|as\s+|=\s*)?(?P<table>{_TABLE})", re.I
)
_TEMPORARY = re.compile(r"\s*(?:create|drop)\s+(?:or\s+replace\s+)?temporary\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A QUERY event: the text and the database that it ran in."""

    database: str
    text: str


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a statement does to the tables that are followed.

    Attributes:
      emptied: tables that lost rows by it, or all of them.
      unreadable: why the log does not tell what it did to the rows; "" if it does.
    """

    emptied: tuple[str, ...] = ()
    unreadable: str = ""


NOTHING = Effect()


def read_query(body: bytes, names: Mapping[int, str]) -> Statement:
    """Returns the statement of a QUERY event's body.

    Args:
      names: collation ids to character sets, for the text's own.
    """
    database_size = body[8]
    status_size = int.from_bytes(body[11:13], "little")
    status = body[13 : 13 + status_size]
    at = 13 + status_size
    database = body[at : at + database_size].decode(errors="replace")
    text = body[at + database_size + 1 :]
    reading = charsets.reading(names.get(_client_collation(status), "utf8mb4"))
    codec = "utf_8" if reading.mode == COPIED else reading.codec
    return Statement(database, text.decode(codec, errors="replace"))


# Sizes of the status variables that stand before the client's character set.
_STATUS_SIZES = {0: 4, 1: 8, 3: 4}
_CATALOG_NZ, _CHARSET = 6, 4


def _client_collation(status: bytes) -> int:
    at = 0
    while at < len(status):
        code = status[at]
        if code == _CHARSET:
            return int.from_bytes(status[at + 1 : at + 3], "little")
        if code == _CATALOG_NZ:
            at += 2 + status[at + 1]
        elif code in _STATUS_SIZES:
            at += 1 + _STATUS_SIZES[code]
        else:
            break
    return 0


def xa_end(statement: Statement) -> str:
    """Returns `commit` or `rollback` of an `XA COMMIT` or `XA ROLLBACK`, else ""."""
    words = statement.text[:20].lower().split()
    return words[1] if len(words) > 1 and words[0] == "xa" and words[1] != "end" else ""


def effect(statement: Statement, followed: Collection[str], fold: bool) -> Effect:
    """Returns what a statement means for the followed tables, `database.table`.

    Args:
      fold: whether the server's table names ignore case.
    """
    text = _EXECUTED.sub(" ", _COMMENT.sub(" ", statement.text))
    tables = _Followed(statement.database, followed, fold)
    word = _FIRST_WORD.match(text)
    if word is None or _TEMPORARY.match(text):
        return NOTHING
    if word[1].lower() in _ROW_WORDS:
        touched = tables.mentioned(text)
        if not touched:
            return NOTHING
        return Effect(unreadable=f"rows of {', '.join(touched)} were changed by a statement")
    return _definition(text, tables)


def _definition(text: str, tables: "_Followed") -> Effect:
    """Returns the effect of a statement that defines tables."""
    if found := _TRUNCATE.match(text):
        return Effect(tables.named(_TABLES.findall(text[found.end() :])[:1]))
    if found := _DROP.match(text):
        return Effect(tables.named(_TABLES.findall(found["tables"])))
    if found := _DROP_DATABASE.match(text):
        return Effect(tables.of_database(found["name"]))
    if found := _REPLACE.match(text):
        return Effect(tables.named([found["table"]]))
    if found := _RENAME.match(text):
        pairs = re.findall(
            rf"({_TABLE})\s+(?:(?:wait\s+\d+|nowait)\s+)?to\s+({_TABLE})", found["pairs"], re.I
        )
        return _renamed(tables, [old for old, _ in pairs], [new for _, new in pairs])
    if found := _ALTER.match(text):
        if renamed := _ALTER_RENAME.search(found["rest"]):
            return _renamed(tables, [found["table"]], [renamed["table"]])
        if _MOVES_ROWS.search(found["rest"]):
            return Effect(tables.named([found["table"]]))
    return NOTHING


def _renamed(tables: "_Followed", old: list[str], new: list[str]) -> Effect:
    """A table that comes under a followed name brings rows that no log has under that name."""
    if arrived := tables.named(new):
        return Effect(unreadable=f"another table was renamed to {', '.join(arrived)}")
    return Effect(tables.named(old))


class _Followed:
    """The followed tables as statements of one database name them."""

    def __init__(self, database: str, followed: Collection[str], fold: bool):
        self._database, self._fold = database, fold
        self._tables = {self._key(name): name for name in followed}

    def named(self, names: Collection[str]) -> tuple[str, ...]:
        """Returns which followed tables these names mean, in order, each once."""
        found = [self._tables.get(self._key(self._full(name))) for name in names]
        return tuple(dict.fromkeys(name for name in found if name))

    def mentioned(self, text: str) -> tuple[str, ...]:
        """Returns followed tables whose bare name stands anywhere in a text."""
        words = {self._key(_bare(word)) for word in re.findall(_NAME, text)}
        return tuple(name for key, name in self._tables.items() if key.rpartition(".")[2] in words)

    def of_database(self, name: str) -> tuple[str, ...]:
        start = self._key(_bare(name)) + "."
        return tuple(table for key, table in self._tables.items() if key.startswith(start))

    def _full(self, name: str) -> str:
        parts = [_bare(part) for part in re.findall(_NAME, name)]
        return ".".join(parts if len(parts) > 1 else [self._database, *parts])

    def _key(self, name: str) -> str:
        return name.casefold() if self._fold else name


def _bare(name: str) -> str:
    return name[1:-1].replace("``", "`") if name.startswith("`") else name
