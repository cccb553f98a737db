"""Judge all consult stores by the rules of quality, and gather their alarms."""

import collections.abc
import dataclasses

import psycopg

from schemas.clocks import wall_clock_us
from schemas.config import Config
from schemas.errors import reason
from schemas.quality_rules import QualityRules
from schemas.reports import AlarmCount
from transforms import postgresql_sessions
from transforms.deliver import store_schema
from transforms.deliver.judging import check_store


@dataclasses.dataclass(frozen=True)
class StoreQuality:
    """One store: what the check came to by campus, or `why` it could not be made."""

    store: str
    checked: tuple[check_store.Checked, ...] = ()
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """An open alarm; `record_id` is the row's key at its campus, no value of a column is kept.

    `version`: the version vector of a row that clients have edited, else empty.
    """

    store: str
    campus: str
    table: str
    record_id: str
    lsn: int
    seq: int
    rule: int
    column: str
    reason: str
    noted_at: str
    version: str = ""


def check_stores(
    config: Config,
    rules: QualityRules,
    now_us: collections.abc.Callable[[], int] = wall_clock_us,
    judge_rows: bool = True,
) -> list[StoreQuality]:
    """Judges in every store what came since the last time; a store that is down is named.

    To be called again and again; safe beside the sync job and beside itself.
    """
    return [check_one(config, name, rules, now_us, judge_rows) for name in config.links_by_store()]


def check_one(
    config: Config,
    store: str,
    rules: QualityRules,
    now_us: collections.abc.Callable[[], int] = wall_clock_us,
    judge_rows: bool = True,
) -> StoreQuality:
    """Judges one store, as `check_stores`; each of its links in a transaction of its own."""
    try:
        with connect(config.stores[store].dsn) as conn:
            store_schema.ensure(conn)
            checked = [
                check_store.check_campus(conn, link, rules, now_us(), judge_rows)
                for link in config.links_by_store()[store]
            ]
        return StoreQuality(store, tuple(checked))
    except psycopg.Error as error:
        return StoreQuality(store, why=reason(error))


def captured(config: Config, store: str) -> int:
    """Returns how many changes a store has taken in so far.

    Raises:
      psycopg.Error: it cannot be asked.
    """
    with connect(config.stores[store].dsn) as conn:
        store_schema.ensure(conn)
        return conn.execute(
            "SELECT coalesce(sum(captured), 0)::bigint FROM sync.progress"
        ).fetchone()[0]


def gather_alarms(
    config: Config, rules: collections.abc.Iterable[int] | None = None, limit: int | None = None
) -> tuple[list[Alarm], list[AlarmCount], list[str]]:
    """Returns open alarms of all stores, their counts, and the stores that were not reached.

    Args:
      rules: numbers to list; None: all. limit: of alarms from each store; counts are whole.
    """
    alarms, counts, unreachable = [], [], []
    wanted = None if rules is None else sorted(set(rules))
    for name in config.links_by_store():
        try:
            with connect(config.stores[name].dsn) as conn:
                store_schema.ensure(conn)
                for *place, noted_at, version in check_store.open_alarms(conn, wanted, limit):
                    campus, table, record, lsn, seq, rule, column, why = place
                    row = (name, campus, table, record, lsn, seq, rule, column, why)
                    alarms.append(Alarm(*row, noted_at.isoformat(), version))
                counts += [AlarmCount(name, *row) for row in check_store.counts(conn)]
        except psycopg.Error as error:
            unreachable.append(f"store {name}: {reason(error)}")
    return alarms, counts, unreachable


def connect(dsn: str) -> psycopg.Connection:
    """Returns an autocommit connection for a `with`."""
    return postgresql_sessions.connect(
        dsn,
        options="-c timezone=UTC -c jit=off",
        application_name="campus_sync_quality",
    )
