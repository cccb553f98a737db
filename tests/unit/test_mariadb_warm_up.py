"""The made-up transaction that compiles the kernels is a whole one."""

from transforms.capture.mariadb import cells, events, result_rows
from transforms.capture.mariadb.warm_up import warm_up


def test_it_goes_through_everything():
    rows = [row for batch in warm_up() for row in batch.tables["none.none"].to_pylist()]
    assert [(chr(row["_op"]), row["id"], row["v"]) for row in rows] == [
        ("I", "1", "张三"),
        ("U", "1", "张三"),
        ("D", "1", "张三"),
    ]


def test_nothing_is_compiled_for_a_real_log_after_it():
    """The kinds of arrays that warm it up are those that it is given later."""
    warm_up()
    kernels = (events.scan, cells.write_rows, result_rows.write_result)
    assert [len(kernel.signatures) for kernel in kernels] == [1, 1, 1]
