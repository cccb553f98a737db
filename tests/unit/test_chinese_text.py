"""Chinese text: what was damaged is noticed, what GBK cannot hold is written another way."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.embedded.documents import Documents
from runners.embedded.knowledge import DRUGS, EMERGENCIES, EXAMINATIONS, ITEMS, PANELS, ROUTINE
from runners.embedded.people import _GIVEN_FEMALE, _GIVEN_MALE, _SURNAMES
from transforms.harmonise.damaged_text import Damage, count_damage, damage_of
from transforms.harmonise.gbk import MISSING, SUBSTITUTES, fits_gbk, for_gbk

SOUND = [
    "张三", "欧阳修", "王䶮", "李𬭎", "联通", "联想", "ABC", "", "café", "Sjögren综合征",
    "Ménière病", "血糖5.6mmol/L", "10⁹/L", "µmol/L", "±0.5", "37℃", "肺部感染?", "是否？？",
    "阿司匹林100mg qd×3天", "《病历》", "①②③", "naïveté", "¿Qué?", "Ω≈ç√", "ab?cd?", "20°~30°",
]  # fmt: skip
WORDS = ["张三", "王小明", "高血压病2级", "患者诉头晕，血压160/95mmHg。", "急性ST段抬高型心肌梗死"]


def damage(text: str) -> Damage:
    return Damage(int(damage_of(pa.array([text]))[0]))


@pytest.mark.parametrize("text", SOUND)
def test_sound_text_is_sound(text):
    assert damage(text) == Damage(0)


@pytest.mark.parametrize("text", WORDS)
def test_gbk_read_as_western_letters(text):
    broken = text.encode("gbk").decode("latin-1")
    assert damage(broken) == Damage.READ_AS_LATIN1


@pytest.mark.parametrize("text", WORDS)
def test_utf8_read_as_gbk(text):
    for errors in ("replace", "ignore"):
        broken = text.encode().decode("gbk", errors)
        assert damage(broken) & (Damage.READ_AS_GBK | Damage.REPLACED), broken


def test_the_domains_examples():
    assert damage("ÕÅÈý") == Damage.READ_AS_LATIN1
    assert damage("寮犱笁") == Damage.READ_AS_GBK
    assert damage("王??") == Damage.QUESTION_MARKS
    assert damage("王\ufffd") == Damage.REPLACED
    assert damage("患者：ÕÅÈý，男") == Damage.READ_AS_LATIN1


def test_no_false_alarm_in_names():
    surnames = [word.rstrip("0123456789") for word in _SURNAMES.split()]
    given_names = sorted({*_GIVEN_MALE, *_GIVEN_FEMALE})
    names = [s + g for s, g in itertools.product(surnames, given_names)]
    pairs = itertools.islice(itertools.product(given_names, given_names), 0, None, 3)
    names += [s + a + b for s, (a, b) in itertools.product(surnames[::7], pairs)]
    assert len(names) > 30_000
    assert count_damage(pa.array(names)) == {}


def test_no_false_alarm_in_what_the_hospital_writes():
    rng = np.random.default_rng(1)
    documents = Documents(rng)
    texts = [documents.text(rng, "病程记录", 3000) for _ in range(50)]
    texts += [t for i in (*ROUTINE, *EMERGENCIES) for t in (i.name, i.complaint, i.department)]
    texts += [entry.name for entry in (*ITEMS, *PANELS.values(), *DRUGS.values())]
    texts += list(EXAMINATIONS.values())
    assert count_damage(pa.array(texts)) == {}


@given(st.lists(st.text(max_size=20) | st.none(), max_size=10), st.integers(0, 3))
def test_damage_is_of_each_text_alone(texts, cut):
    array = pa.array(texts, pa.utf8())
    whole = damage_of(array)
    assert damage_of(array.slice(cut)).tolist() == whole[cut:].tolist()
    alone = [0 if text is None else int(damage(text)) for text in texts]
    assert whole.tolist() == alone


@pytest.mark.parametrize(
    ("text", "written", "lost"),
    [
        ("张三", "张三", ""),
        ("白细胞5.6×10⁹/L", "白细胞5.6×10^9/L", ""),
        ("10⁻¹²", "10^-12", ""),
        ("m²和cm³", "m^2和cm^3", ""),
        ("88.4µmol/L", "88.4μmol/L", ""),
        ("王䶮", f"王{MISSING}", "䶮"),
        ("李𬭎𡒉", f"李{MISSING}{MISSING}", "𬭎𡒉"),
        ("•头孢", "·头孢", ""),
        ("€5", "EUR5", ""),
        ("乗俓匼", "乗俓匼", ""),  # Their second byte is a backslash.
        ("Ménière", "Ménière", ""),
        ("Sjögren", "Sjogren", ""),
        ("", "", ""),
    ],
)
def test_for_gbk(text, written, lost):
    result = for_gbk(text)
    assert (result.text, "".join(result.lost)) == (written, lost)
    assert result.faithful == (not lost)
    assert written.encode("gbk").decode("gbk") == written


def test_every_substitute_is_needed_and_fits():
    originals = pa.array(list(SUBSTITUTES))
    assert not fits_gbk(originals).any()
    assert fits_gbk(pa.array(list(SUBSTITUTES.values()))).all()
    assert fits_gbk(pa.array([MISSING, None])).all()


@given(st.text(max_size=30))
def test_fits_gbk_is_the_codecs_word(text):
    try:
        fits = text.encode("gbk").decode("gbk") == text
    except UnicodeEncodeError:
        fits = False
    assert fits_gbk(pa.array([text])).tolist() == [fits]
    result = for_gbk(text)
    result.text.encode("gbk")
    assert (result.text == text) == fits
    assert bool(result.substituted or result.lost) == (not fits)
