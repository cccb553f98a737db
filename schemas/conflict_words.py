"""The conflict policies in words, in English and Chinese: what doctors read and sign."""

import collections.abc
import typing

from schemas.conflict_policy import (
    Branches,
    ConflictRules,
    HoldBoth,
    Immutable,
    Never,
    Newest,
    Owner,
    Policy,
    Rule,
    Said,
    States,
    Union,
)

Language = typing.Literal["en", "zh"]

_HEADS = {
    "en": ("Record", "What", "If two change it unaware of each other", "Told as", "Asked"),
    "zh": ("记录", "内容", "两人互不知情地同时修改时", "提示", "裁定人"),
}
_ALARMS = {
    "none": Said(en="not told", zh="不提示"),
    "notice": Said(en="notice", zh="通知"),
    "alarm": Said(en="alarm", zh="报警"),
    "emergency": Said(en="emergency alarm", zh="紧急报警"),
}
_OFFICES = {
    "empi office": "主索引管理员",
    "transfusion department": "输血科",
    "laboratory": "检验科",
    "pharmacist": "药师",
}
_RULES = {
    Rule.ARCHIVED: Said(en="what is archived", zh="已归档者"),
    Rule.EMERGENCY: Said(en="emergency over routine", zh="急诊优先于常规"),
    Rule.ROLE: Said(en="the higher role", zh="职级高者"),
    Rule.TIME: Said(en="the later edit, if clocks allow", zh="时间较晚者（时钟可信时）"),
}
_DELETES = {
    "person": Said(
        en="stays in sight; a person decides whether it is deleted",
        zh="删除与修改冲突：保持可见，由人裁定是否删除",
    ),
    "stays": Said(en="the change stands, the deletion does not", zh="修改有效，删除无效"),
    "goes": Said(en="the deletion stands", zh="删除有效"),
}


def policy_words(rules: ConflictRules, language: Language = "en") -> str:
    """Returns the policies of all tables as one Markdown table, with the order of the rules."""
    heads = _HEADS[language]
    lines = [_preamble(rules, language), "", _row(heads), _row(["---"] * len(heads))]
    for table in sorted(rules.tables.values(), key=lambda t: t.writers != "stores"):
        name = _in(table.said, language)
        for policy in (*table.groups, table.deletes):
            asked = _asked(policy.assignee, rules, language)
            alarm = _in(_ALARMS[policy.alarm], language)
            what = _in(policy.said, language)
            settled = _settled(policy, language)
            lines.append(_row([name, what, settled, alarm, asked]))
            name = ""
    return "\n".join(lines) + "\n"


def _in(said: Said, language: Language) -> str:
    return said.zh if language == "zh" else said.en


def _row(cells: collections.abc.Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _preamble(rules: ConflictRules, language: Language) -> str:
    roles = [_in(said, language) for said in rules.roles.values()]
    minutes = f"{rules.skew_bound_us / 60_000_000:g}"
    pairs = [
        tuple(_in(rules.roles[role], language) for role in pair) for pair in sorted(rules.undecided)
    ]
    if language == "zh":
        open_cases = "；".join(f"{a}的急诊修改对{b}的常规修改" for a, b in pairs)
        return (
            f"职级由高到低：{'、'.join(roles)}。相差不足 {minutes} 分钟视为同时。"
            f"交由人裁定：{open_cases}。未采用的版本永久保留、可查。"
        )
    open_cases = "; ".join(
        f"an emergency edit by a {a} against a routine one by an {b}" for a, b in pairs
    )
    return (
        f"Roles from the highest: {', '.join(roles)}. Less than {minutes} minutes apart is at the "
        f"same time. Always left to a person: {open_cases}. What is not chosen is kept for ever "
        "and can be read."
    )


def _asked(assignee: str, rules: ConflictRules, language: Language) -> str:
    if assignee in rules.roles:
        return _in(rules.roles[assignee], language)
    return _OFFICES.get(assignee, assignee) if language == "zh" else assignee


def _by(by: tuple[Rule, ...], language: Language) -> str:
    if language == "zh":
        return "，其次".join(_RULES[rule].zh for rule in by) + "；仍不能定则由人裁定"
    return ", then ".join(_RULES[rule].en for rule in by) + "; else a person decides"


def _settled(policy: Policy, language: Language) -> str:
    """Returns what happens to two concurrent values of a group."""
    zh = language == "zh"
    if isinstance(policy, Never):
        locked = ("; nothing is shown until then", "，此前锁定不显示") if policy.lock else ("", "")
        return f"不自动处理，由人裁定{locked[1]}" if zh else f"never by rule: a person{locked[0]}"
    if isinstance(policy, Owner):
        return (
            "以源系统为准，其他修改另存" if zh else "the source's value; the other is kept beside"
        )
    if isinstance(policy, Immutable):
        return (
            "首次记录不变，不同者隔离待裁定"
            if zh
            else "the first stays; another waits for a person"
        )
    if isinstance(policy, Newest):
        return ("显示其一：" if zh else "one is shown: ") + _by(policy.by, language)
    if isinstance(policy, Branches):
        start = "全文不混合，分支保留；显示：" if zh else "never mixed, branches kept; shown: "
        return start + _by(policy.by, language)
    if isinstance(policy, Union):
        none = "、".join(policy.none)
        text = (
            "合并，只增不减；删除须由人裁定" if zh else "all are joined; taking out needs a person"
        )
        more = f"；“{none}”让位于阳性记录" if zh else f"; {none} yield to anything else"
        return text + (more if none else "")
    if isinstance(policy, HoldBoth):
        text = "两者都保留并报警，由人裁定" if zh else "both are held; a person decides"
        if policy.foremost is None:
            return text
        values = "、".join(policy.foremost.values) if zh else " or ".join(policy.foremost.values)
        return text + (f"；其间先显示 {values}" if zh else f"; meanwhile {values} is shown")
    if isinstance(policy, States):
        order = " → ".join(policy.leads_to)
        return f"取流程更后的状态（{order}）" if zh else f"the state further on ({order})"
    return _in(_DELETES[policy.rule], language)
