"""Links: one source feeding one consult store, the unit of progress, lag, failure and SLA."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one link's memory, disk and patience.

    Attributes:
      batch_rows, batch_bytes: largest change batch, unless one row is larger.
      in_flight_rows: how far the routine lane may run ahead of its ledger.
      spool_memory_bytes, spool_disk_bytes: what is read ahead of delivery, in memory
        and then sealed on disk; beyond both the reader stops reading.
      gather_s: how long routine changes are gathered before they leave the spool.
      window_s, early_rows, early_s: the routine lane's event-time windows and early panes; with
        an `early_s` of 0 what the reader has gathered is a pane.
      snapshot_rows_s: how many rows a second a snapshot reads of its source; 0: as it can.
      heartbeat_s: how often an idle source moves its ledger, watermark and slot.
      resend_emergency_s, resend_routine_s: how long a lane's ledger may stand still with
        changes in flight before they are sent again.
    """

    batch_rows: int = 20_000
    batch_bytes: int = 8_000_000
    in_flight_rows: int = 150_000
    spool_memory_bytes: int = 192 << 20
    spool_disk_bytes: int = 8 << 30
    gather_s: float = 0.4
    window_s: int = 60
    early_rows: int = 50_000
    early_s: float = 0.0
    snapshot_rows_s: int = 0
    heartbeat_s: float = 1.0
    resend_emergency_s: float = 2.0
    resend_routine_s: float = 20.0

    @property
    def snapshot_batch_rows(self) -> int:
        """Rows of one batch of a snapshot: of no more than a second, where it is throttled."""
        return min(self.batch_rows, self.snapshot_rows_s or self.batch_rows)


@dataclasses.dataclass(frozen=True)
class SetSettings:
    """What a source's links write to several stores all or none, and how (ADR 0026).

    Attributes:
      tables: of each kind of set. degrade: a store that is down gets its sets later; else nobody
        gets them before. deadline_s: of one two-phase commit.
      log_dsn: of the primary store, which keeps the decisions.
      stores: name and connection string of every store that the source feeds.
      branches: likewise of the MariaDBs that hold the canonical tables, too.
    """

    tables: tuple[tuple[str, ...], ...]
    degrade: bool
    deadline_s: float
    log_dsn: str
    stores: tuple[tuple[str, str], ...]
    branches: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class LinkSettings:
    """Everything a worker needs to serve one link; holds references to secrets, never secrets.

    Attributes:
      name: `source>store`. slot: its replication slot, or what stands for one.
      source_kind: `postgresql`, `mariadb` (MySQL too) or `debezium`.
      source_options: JSON of what only one kind has.
      generation: which of the source's logs is the one to read (ADR 0030).
      source_dsn, store_dsn: libpq connection strings; passwords by passfile or service.
      mapping, rules: absolute paths of the campus's mapping and emergency rules files.
      key_ref: where the dead letters' key is (`file:` or `env:`).
      sets: None where every store's rows are its own matter.
      one_worker: whether the process that reads the link also delivers it: batches then
        stay in it and tickets for them travel (ADR 0011). Wrong, it only costs time.
    """

    name: str
    source: str
    store: str
    source_dsn: str
    store_dsn: str
    slot: str
    publication: str
    mapping: str
    rules: str
    key_ref: str
    limits: Limits = Limits()
    one_worker: bool = False
    source_kind: str = "postgresql"
    source_options: str = ""
    generation: int = 0
    sets: SetSettings | None = None
