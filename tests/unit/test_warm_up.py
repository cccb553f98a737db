"""What is made up to compile the kernels passes through all of them."""

from schemas.links import LinkSettings
from schemas.mappings import load_mapping
from transforms.capture.warm_up import warm_up, warm_up_decoder
from transforms.seal_dead_letters import make_key


def test_the_made_up_rows_are_decoded():
    (raw,) = warm_up_decoder()
    assert raw.captured == raw.tables["none.none"].num_rows == 3


def test_every_mapped_table_is_taken_through_in_silence(tmp_path, caplog):
    make_key(tmp_path / "key")
    settings = LinkSettings(
        "a>b", "a", "b", "", "", "s", "p", "postgresql_his", "default", f"file:{tmp_path / 'key'}"
    )
    warm_up(settings, load_mapping("postgresql_his"))
    assert not caplog.records
