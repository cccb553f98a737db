"""The file of matching rules: what is read, and what is refused with its line."""

import pytest

from schemas.errors import ConfigError
from schemas.patient_matching import DEFAULT_PATH, load_matching_rules

TEXT = DEFAULT_PATH.read_text(encoding="utf-8")


def test_the_packaged_rules_are_those_of_the_domain_notes():
    content = load_matching_rules().content
    assert list(content.weights.model_dump().values()) == [0.45, 0.20, 0.15, 0.10, 0.05, 0.05]
    assert (content.thresholds.link, content.thresholds.review) == (0.85, 0.60)
    assert load_matching_rules().variants["張"] == "张"


REFUSED = [
    ("name: 0.20", "name: 0.30", "do not add up to 1"),
    ("review: 0.60}", "review: 0.90}", "is above `link`"),
    ("link: 0.85", "link: 0.50", "is reached without an id_no"),
    ("agreeing: 2", "agreeing: 1", "review.agreeing"),
    ("name_likeness: 0.9", "name_likeness: 0.5", "automatic.name_likeness"),
    ("张張", "张", "has one character"),
    ("张張", "张張陳", "another group"),
    ('"1900-01-01"', '"1900-13-01"', "is no date"),
    ('"测试"', '"("', "no regular expression"),
    ("block_records", "block_record", "did you mean `block_records`?"),
]


@pytest.mark.parametrize(("old", "new", "said"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_does_not_fit_is_refused_with_its_line(tmp_path, old, new, said):
    path = tmp_path / "empi.yaml"
    assert old in TEXT
    path.write_text(TEXT.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_matching_rules(path)
    text = str(caught.value)
    assert said in text and "line " in text and "empi.yaml" in text
