"""Read MariaDB and MySQL: row binlog to columns, snapshots, and what preflight asks."""
