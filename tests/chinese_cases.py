"""Chinese text as hospitals have it, with what becomes of each on every way there and back."""

from typing import NamedTuple

from transforms.harmonise.damaged_text import Damage
from transforms.harmonise.gbk import MISSING as M


class Case(NamedTuple):
    """A text that must reach the consult store exactly as it is.

    Attributes:
      gbk: what a GBK end is given instead; None: the text itself, which GBK holds.
      lost: characters of it for which nothing stands there.
      damage: how it is marked.
    """

    label: str
    text: str
    gbk: str | None = None
    lost: str = ""
    damage: Damage = Damage(0)


CASES = (
    Case("a name", "张三"),
    Case("second byte is a backslash", "乗俓匼\\"),
    Case("second byte is a quote or a bar", "丂丄|'`"),
    Case("traditional", "會診醫師"),
    Case("rare surname, extension A", "王䶮", f"王{M}", "䶮"),
    Case("GB18030 only, beyond the first plane", "李𬭎𡒉", f"李{M}{M}", "𬭎𡒉"),
    Case("GB18030-2022's own characters", "鿫鿬", f"{M}{M}", "鿫鿬"),
    Case("compatibility ideograph", "﨑"),
    Case("full-width", "ＡＢＣ１２３％（）：，。"),
    Case("full-width space and middle dot", "阿不都\u3000·\u3000热合曼"),
    Case("half-width katakana", "ｱ", M, "ｱ"),
    Case("superscripts", "5.6×10⁹/L", "5.6×10^9/L"),
    Case("micro sign", "88.4µmol/L", "88.4μmol/L"),
    Case("Greek mu", "88.4μmol/L"),
    Case("signs and numerals", "①⑩Ⅱ℃±≤≥↑↓№"),
    Case("euro, bullet, minus", "€5 • −3", "EUR5 · -3"),
    Case("western letters", "Ménière Sjögren", "Ménière Sjogren"),
    Case("combining accent", "e\u0301", f"e{M}", "\u0301"),
    Case("emoji", "送急诊\U0001f691", f"送急诊{M}", "\U0001f691"),
    Case("emoji of several", "\U0001f468\u200d\u2695\ufe0f", f"{M}{M}", "\U0001f468\u2695"),
    Case("zero-width space", "张\u200b三", "张三"),
    Case("byte order mark within", "\ufeff张三", "张三"),
    Case("writing direction", "张\u200e三", "张三"),
    Case("no-break space", "张\u00a0三", "张 三"),
    Case("line ends", "一\r\n二\n三\r四\u2028五", f"一\r\n二\n三\r四{M}五", "\u2028"),
    Case("controls", "甲\t乙\x01\x7f"),
    Case("private use", "李\ue000", f"李{M}", "\ue000"),
    Case("bytes that were no text", "王\ufffd", f"王{M}", "\ufffd", Damage.REPLACED),
    Case("GBK read as western", "ÕÅÈý", f"{M}{M}{M}{M}", "ÕÅÈý", Damage.READ_AS_LATIN1),
    Case("UTF-8 read as GBK", "寮犱笁", damage=Damage.READ_AS_GBK),
    Case("question marks", "王??", damage=Damage.QUESTION_MARKS),
    Case("one question mark", "肺部感染?"),
    Case("spaces at both ends", " 张三 "),
    Case("empty", ""),
    Case("long", "诊" * 2000),
)
