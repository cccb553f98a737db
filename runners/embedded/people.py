"""Invented people of China: names, identity numbers, phones and blood groups that look real.

None of them exists. Their identity numbers are valid in form and check digit, but their first
six digits name a district that was never assigned: no administrative division of GB/T 2260
begins with 69, so no citizen's number does. Their mobile numbers begin with 154, the one
number segment between 150 and 159 that no operator was given.
"""

import dataclasses
import datetime

import numpy as np

DISTRICTS = ("690101", "690102", "690103")
PHONE_PREFIX = "154"
MALE, FEMALE, UNKNOWN = "1", "2", "0"  # GB/T 2261.1
CHECK_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643
CHECK_DIGITS = "10X98765432"

# People with the surname, in tenths of a percent of the population; the rest share what is left.
_SURNAMES = (
    "王72 李70 张65 刘51 陈46 杨32 赵22 黄22 周20 吴20 徐17 孙15 胡13 朱13 高12 林12 何11 郭11 "
    "马11 罗9 梁8 宋8 郑8 谢7 韩7 唐7 冯6 于6 董6 萧6 程6 曹6 袁5 邓5 许5 傅5 沈5 曾5 彭5 吕5 "
    "苏4 卢4 蒋4 蔡4 贾4 丁4 魏4 薛4 叶4 阎4 余4 潘4 杜4 戴4 夏4 钟4 汪4 田4 任4 姜4 范3 方3 石3 "
    "姚3 谭3 廖3 邹3 熊3 金3 陆3 郝3 孔3 白3 崔3 康3 毛3 邱3 秦3 江3 史3 顾3 侯3 邵3 孟3 龙3 万2 "
    "段2 雷2 钱2 汤2 尹2 黎2 易2 常2 武2 乔2 贺2 赖2 龚2 文2 欧阳1 上官1 司徒1 诸葛1 尉迟1 皇甫1 "
    "仇1 单1 查1 乐1 区1 冼1 麦1 覃2 农1 尕1 翁1 纪1 辛1 管1"
)
_GIVEN_MALE = (
    "伟强磊军勇杰涛超明刚平辉鹏飞波斌宇浩凯健俊帆鑫龙海峰志建国华文博轩子睿昊然泽宇航晨阳毅成德福"
    "贵兴旺树林根生长河山东南江川"
)
_GIVEN_FEMALE = (
    "芳娜秀英敏静丽艳娟霞燕玲桂兰红梅雪婷慧颖莹琳欣怡佳雨涵诗梓萱思淑珍玉凤春菊翠莲素琴爱云月仙"
    "巧香蓉薇倩洁瑶琪妍"
)
# Characters beyond GBK, in names of living people: they break systems that think in GBK.
_GIVEN_RARE = "䶮𬭎㛃𫖯𬀩𫍯𡒉㭎𬘭𠅤"
_ALLERGENS = (
    ("青霉素", "皮疹"),
    ("头孢类", "荨麻疹"),
    ("磺胺类", "皮疹"),
    ("碘造影剂", "恶心、皮疹"),
    ("阿司匹林", "哮喘"),
    ("海鲜", "荨麻疹"),
    ("花粉", "鼻炎"),
    ("左氧氟沙星", "瘙痒"),
    ("破伤风抗毒素", "皮试阳性"),
)
# What the reactions above are, for who writes them down one by one.
SEVERITIES = {"荨麻疹": "moderate", "皮试阳性": "moderate", "哮喘": "severe"}
# Of Han Chinese; RhD negative are about three in a thousand.
_ABO = (("A", 0.30), ("B", 0.27), ("O", 0.34), ("AB", 0.09))
_RH_NEGATIVE = 0.003
# Who comes to a hospital, by age: (from, to, share).
_AGES = (
    *((0, 3, 0.07), (3, 15, 0.10), (15, 35, 0.20)),
    *((35, 55, 0.25), (55, 75, 0.27), (75, 98, 0.11)),
)


@dataclasses.dataclass(frozen=True)
class Person:
    """One invented person. Fields that a hospital may not know are None.

    Attributes:
      sex: GB/T 2261.1, `0` unknown, `1` male, `2` female; agrees with `id_no`.
      rh: `+` or `-`.
      allergies: free text; `无` where there is none, None where nobody asked.
    """

    name: str
    sex: str
    birth_date: datetime.date
    id_no: str | None
    phone: str | None
    abo: str | None
    rh: str | None
    allergies: str | None

    def age(self, today: datetime.date) -> int:
        """Returns full years."""
        had_birthday = (today.month, today.day) >= (self.birth_date.month, self.birth_date.day)
        return today.year - self.birth_date.year - (not had_birthday)


class People:
    """Draws people, always the same ones for the same generator state and day.

    Args:
      rng: every choice comes from it.
      today: ages are counted to this day.
    """

    def __init__(self, rng: np.random.Generator, today: datetime.date):
        self._rng = rng
        self._today = today
        entries = [(word.rstrip("0123456789"), word) for word in _SURNAMES.split()]
        self._surnames = [name for name, _ in entries]
        weights = np.array([float(word[len(name) :]) for name, word in entries])
        self._surname_ends = np.cumsum(weights / weights.sum())

    def person(self, sex: str | None = None, ages: tuple[int, int] | None = None) -> Person:
        """Returns a new person, of the given sex and with `ages[0] <= age < ages[1]`."""
        rng = self._rng
        if sex is None:
            sex = MALE if rng.random() < 0.51 else FEMALE
        birth = self._birth_date(ages)
        known = rng.random(4)
        abo, rh = self._blood() if known[0] < 0.7 else (None, None)
        return Person(
            self._name(sex),
            sex,
            birth,
            self._id_no(birth, sex) if known[1] < 0.96 else None,
            self._phone() if known[2] < 0.93 else None,
            abo,
            rh,
            self._allergies(),
        )

    def unidentified(self) -> Person:
        """Returns somebody brought in without papers, as an emergency room writes them down."""
        sex = (MALE, FEMALE, UNKNOWN)[int(self._rng.choice(3, p=(0.5, 0.4, 0.1)))]
        year = self._today.year - int(self._rng.integers(20, 80))
        name = f"无名氏{int(self._rng.integers(1, 100)):02d}"
        return Person(name, sex, datetime.date(year, 1, 1), None, None, None, None, None)

    def phone(self) -> str:
        """Returns a mobile number that rings nowhere."""
        return self._phone()

    def _name(self, sex: str) -> str:
        rng = self._rng
        surname = self._surnames[int(np.searchsorted(self._surname_ends, rng.random()))]
        pool = _GIVEN_FEMALE if sex == FEMALE else _GIVEN_MALE
        count = 2 if len(surname) == 1 and rng.random() < 0.85 else 1
        given = [pool[int(rng.integers(len(pool)))] for _ in range(count)]
        if rng.random() < 0.004:
            given[-1] = _GIVEN_RARE[int(rng.integers(len(_GIVEN_RARE)))]
        return surname + "".join(given)

    def _birth_date(self, ages: tuple[int, int] | None) -> datetime.date:
        rng = self._rng
        if ages is None:
            ages = _AGES[int(rng.choice(len(_AGES), p=[share for *_, share in _AGES]))][:2]
        # A year is 365.2425 days; a day's slack at each end keeps the age in years exact.
        first, last = int(ages[0] * 365.2425) + 1, int(ages[1] * 365.2425) - 1
        return self._today - datetime.timedelta(days=int(rng.integers(first, last)))

    def _id_no(self, birth: datetime.date, sex: str) -> str:
        rng = self._rng
        district = DISTRICTS[int(rng.integers(len(DISTRICTS)))]
        serial = int(rng.integers(0, 499)) * 2 + (sex == MALE)
        body = f"{district}{birth:%Y%m%d}{serial:03d}"
        return body + check_digit(body)

    def _phone(self) -> str:
        return f"{PHONE_PREFIX}{int(self._rng.integers(10**8)):08d}"

    def _blood(self) -> tuple[str, str]:
        group = int(self._rng.choice(len(_ABO), p=[share for _, share in _ABO]))
        return _ABO[group][0], "-" if self._rng.random() < _RH_NEGATIVE else "+"

    def _allergies(self) -> str | None:
        rng = self._rng
        luck = rng.random()
        if luck < 0.3:
            return None
        if luck < 0.88:
            return "无"
        picks = rng.choice(len(_ALLERGENS), size=1 + int(luck > 0.98), replace=False)
        return "；".join(f"{_ALLERGENS[i][0]}({_ALLERGENS[i][1]})" for i in picks)


def check_digit(body: str) -> str:
    """Returns the 18th character for the first 17 of a citizen identity number (GB 11643)."""
    total = sum(int(digit) * weight for digit, weight in zip(body, CHECK_WEIGHTS, strict=True))
    return CHECK_DIGITS[total % 11]
