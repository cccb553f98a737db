"""One source of any kind, one store, and the link between them."""

import pathlib

import psycopg
import yaml

from runners.run import prepare_stores
from schemas.config import load
from schemas.links import LinkSettings
from tests.faults.harness import QUICK
from transforms.seal_dead_letters import make_key


class OneLink:
    """A campus's configuration in a folder, read and ready to run.

    Args:
      folder: gets campuses.yaml, key and mapping. store: connection string of an empty database.
      name: of the campus. source: its part of campuses.yaml.
      mappings: text by file name, for a `mapping` that is not packaged.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        store: str,
        name: str,
        source: dict,
        mappings: dict[str, str] | None = None,
        limits: dict = QUICK,
    ):
        self.folder, self.store = folder, store
        make_key(folder / "key")
        for file_name, text in (mappings or {}).items():
            (folder / file_name).write_text(text, encoding="utf-8")
        self._content = {
            "version": 1,
            "sources": {name: source},
            "stores": {"primary": {"dsn": store}},
            "dead_letter_key": "file:key",
            "limits": limits,
        }
        self._source = source
        self.configure()
        prepare_stores(self.config)

    def configure(self, **source: object) -> None:
        """Writes and reads campuses.yaml, with more said of the source."""
        self._source.update(source)
        path = self.folder / "campuses.yaml"
        path.write_text(yaml.safe_dump(self._content), encoding="utf-8")
        self.config = load(path)

    @property
    def settings(self) -> LinkSettings:
        (link,) = self.config.links()
        return self.config.settings(link)

    def ask(self, query: str) -> list[tuple]:
        with psycopg.connect(self.store) as connection:
            return connection.execute(query).fetchall()
