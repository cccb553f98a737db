"""What is wrong with a source for us, each with its remedy: for preflight and before a start."""

from collections.abc import Collection

from transforms.capture.mariadb.errors import LogSettingsWrong
from transforms.capture.mariadb.state import LogState

_WANTED = {
    "binlog_format": ("ROW",),
    "binlog_row_metadata": ("FULL",),
    "binlog_row_value_options": ("",),
    "binlog_transaction_compression": ("OFF", "0"),
}
_REMEDY = "SET GLOBAL {name} = '{value}', and in the server's option file"
# Rights of replication have had several names; one of each group serves.
_RIGHTS = (
    ("REPLICATION SLAVE", "REPLICATION REPLICA"),
    ("BINLOG MONITOR", "REPLICATION CLIENT", "SUPER"),
)
_WHOLE_IMAGES = ("FULL", "FULL_NODUP")
_RETENTION_MIN_S = 86_400


def problems(
    state: LogState, tables: Collection[str], engines: dict[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns what keeps these tables from being followed, and what is only to be feared.

    Each is a sentence and its remedy. `engines` are of the tables that exist.
    """
    wrong, odd = [], []
    if not state.logging:
        wrong.append("the binary log is off: set log_bin and server_id and restart the server.")
    for name, values in _WANTED.items():
        found = state.settings.get(name)
        if found is None and name == "binlog_row_metadata":
            wrong.append(
                "the server cannot log column names: it must be MariaDB 10.5 or MySQL 8.0.1 at "
                "least."
            )
        elif found is not None and found.upper() not in values:
            wrong.append(f"{name} is {found}: {_REMEDY.format(name=name, value=values[0])}.")
    if not _has_all(state.grants):
        for names in _RIGHTS:
            if not any(name in grant for name in names for grant in state.grants):
                wrong.append(f"this account lacks {names[0]}: GRANT {names[0]} ON *.* to it.")
    for table in tables:
        if table not in engines:
            wrong.append(f"table {table} does not exist, or this account may not SELECT from it.")
        elif not state.logs(table.partition(".")[0]):
            wrong.append(f"table {table} is not logged: take its database out of the filters.")
        elif engines[table].upper() not in ("INNODB", "ROCKSDB"):
            odd.append(
                f"table {table} is of {engines[table]}: a snapshot of it joins on to the log only "
                "once the log is applied; ALTER TABLE it to InnoDB where that can be done."
            )
    image = state.settings.get("binlog_row_image", "FULL").upper()
    if image not in _WHOLE_IMAGES:
        odd.append(
            f"binlog_row_image is {image}: a new row that leaves a column to its default becomes a "
            "dead letter (partial_row), as the log does not tell the default. "
            f"{_REMEDY.format(name='binlog_row_image', value='FULL')}."
        )
    expire_s = state.retention(state.log_end_lsn, state.now_us, 0).expire_s
    if expire_s is not None and expire_s < _RETENTION_MIN_S:
        odd.append(
            f"the log is kept for {expire_s / 3600:.1f} h: a longer outage needs a new snapshot. "
            f"{_REMEDY.format(name='binlog_expire_logs_seconds', value=7 * _RETENTION_MIN_S)}."
        )
    return tuple(wrong), tuple(odd)


def require_readable(state: LogState) -> None:
    """Checks what the log must be before it is read.

    Raises:
      LogSettingsWrong: all that is wrong, with remedies.
    """
    wrong, _ = problems(state, (), {})
    if wrong:
        raise LogSettingsWrong(f"source {state.server.place}: {' '.join(wrong)}")


def _has_all(grants: tuple[str, ...]) -> bool:
    return any(grant.startswith("GRANT ALL PRIVILEGES ON *.*") for grant in grants)
