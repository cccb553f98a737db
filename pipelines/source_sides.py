"""Read a source's content beside the places of its log, whatever kind it is."""

import contextlib
import dataclasses
from collections.abc import Iterator

from pipelines.source_clocks import log_end
from schemas.config import Source
from schemas.errors import CampusSyncError, SourceUnavailable
from transforms.row_sets import MariadbSide, Reading, SourceSide


def side_of(name: str, source: Source) -> SourceSide:
    """Returns how a source is read."""
    if source.kind == "debezium":
        return TopicSide(name, source)
    side = MariadbSide if source.kind == "mariadb" else SourceSide
    return side(name, source.dsn, source.mapping, source.generation)


class TopicSide(SourceSide):
    """A source whose changes come from a topic, and its content from the database behind it.

    The database does not say how far its connector has come: what the topic held before the view
    is in it, and what the view holds and the topic did not have yet is only to be waited for.
    """

    def __init__(self, campus: str, source: Source):
        super().__init__(campus, source.content or "", source.mapping)
        self._source = source

    @contextlib.contextmanager
    def reading(self, patience_s: float = 2.0) -> Iterator[Reading]:
        """Yields one consistent view of the database, at places of the topic.

        Raises:
          psycopg.Error: of the database. SourceUnavailable: the topic does not answer.
        """
        read_lsn = self._topic_end()
        with super().reading(patience_s) as found:
            yield dataclasses.replace(
                found,
                read_lsn=read_lsn,
                covered_lsn=self._topic_end(),
                given_lsn=None if found.given_lsn is None else read_lsn,
            )

    def _topic_end(self) -> int:
        try:
            return log_end(self._source).lsn
        except CampusSyncError as error:
            raise SourceUnavailable(str(error)) from error
