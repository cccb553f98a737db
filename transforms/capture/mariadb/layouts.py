"""Choose the columns of a source table that its changes carry: the same in log and snapshot."""

from collections.abc import Collection, Sequence

from transforms.capture.columns import COLUMNS_MAX, Layout, TooManyColumns
from transforms.capture.postgresql.pgoutput import KeyUnknown


def table_layout(
    name: str, columns: Sequence[str], key: Sequence[str], wanted: Collection[str] | None
) -> Layout:
    """Returns the layout of a table.

    Args:
      columns: the source's, in its order.
      key: those that identify a row; without one that the table lacks its rows are refused later.
      wanted: those that are carried beside the key; None: all. Where one is gone or renamed all
        are carried: whoever refuses the rows keeps them whole.

    Raises:
      KeyUnknown: there is no key.
      TooManyColumns: more columns are wanted than can be carried.
    """
    if not key:
        raise KeyUnknown(f"table {name} has no primary key: correct the mapping.")
    whole = wanted is None or not {*wanted, *key} <= set(columns)
    if wanted is not None and not (whole and len(columns) <= COLUMNS_MAX):
        carried = {*wanted, *key}
        columns = [column for column in columns if column in carried]
    if len(columns) > COLUMNS_MAX:
        raise TooManyColumns(
            f"table {name} has {len(columns)} columns, {COLUMNS_MAX} can be read: map those that "
            "are needed."
        )
    places = tuple(columns.index(column) for column in key if column in columns)
    return Layout(name, tuple(columns), places, places)
