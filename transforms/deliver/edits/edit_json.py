"""Write in SQL what of a row goes into the JSON of an edit."""

import collections.abc

from schemas.batches import Lane
from schemas.conflict_policy import TablePolicy
from schemas.siblings import CONTENT, DELETED, ROW
from schemas.versions import SOURCE_MARK


def values_of(row: str, columns: collections.abc.Iterable[str]) -> str:
    """Returns SQL: columns of a jsonb `row` as an object of their own."""
    pairs = ", ".join(f"'{column}', {row} -> '{column}'" for column in columns)
    return f"jsonb_build_object({pairs})"


def source_edit(table: TablePolicy, row: str, content: str, campus: str, hlc: str, at: str) -> str:
    """Returns SQL: a source's row as the edit that `transforms.conflicts.edit.source_record` makes.

    Args:
      row: jsonb with every column; content: just these. campus, hlc: its stamp; at: its count.
        The role is the parameter `source_role`.
    """
    wrote = ", ".join(
        f"'{group.group}', jsonb_build_object('values', {values_of(row, group.columns)})"
        for group in table.groups
    )
    actor = f"'{SOURCE_MARK}' || {campus}"
    return (
        f"jsonb_build_object('hlc', {hlc}, 'lane', '{Lane.ROUTINE.value}',"
        f" 'role', %(source_role)s::text, 'editor', {actor},"
        f" 'dot', jsonb_build_array({actor}, {at}), 'wrote', jsonb_build_object('{ROW}',"
        f" jsonb_build_object('values', jsonb_build_object('{DELETED}', false, '{CONTENT}',"
        f" substr(encode(sha256(convert_to(({content})::text, 'UTF8')), 'hex'), 1, 16))), {wrote}))"
    )
