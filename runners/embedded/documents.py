"""Clinical documents: long Chinese texts that no compression makes small."""

import numpy as np

# Filled with numbers, as real notes are: text that only repeats itself would be stored inline,
# compressed, and never exercise how PostgreSQL leaves an unchanged long text out of an update.
_SENTENCES = (
    "患者于{0}时{1}分诉症状较前减轻，体温{2}.{3}℃，脉搏{4}次/分，呼吸{5}次/分，血压{6}/{7}mmHg。",
    "查体：神志清楚，双侧瞳孔等大等圆，直径{2}.{0}mm，对光反射灵敏，双肺呼吸音粗，可闻及散在湿啰音。",
    "辅助检查第{8}次回报：白细胞{5}.{9}×10⁹/L，血红蛋白{6}g/L，血小板{4}{1}×10⁹/L，C反应蛋白{7}.{3}mg/L。",
    "心电图示窦性心律，心率{4}次/分，PR间期{6}ms，QTc间期{8}ms，ST段未见明显抬高。",
    "今日入量{8}{1}mL，出量{6}{9}mL，引流液{7}mL，色淡红，继续观察。",
    "嘱继续目前治疗方案，{0}小时后复查血气分析及电解质，如血钾低于{3}.{9}mmol/L及时补钾。",
    "上级医师查房意见：诊断明确，病情{2}级护理，注意监测生命体征，必要时请相关科室会诊。",
    "已向患者及家属交代病情、治疗方案及可能的风险，家属表示理解并于{0}时{1}分签字，电话尾号{8}{9}。",
    "腹部平软，无压痛及反跳痛，肠鸣音{5}次/分，双下肢无水肿，NRS疼痛评分{3}分，跌倒风险评分{1}分。",
    "护理记录编号{8}{6}{7}：皮肤完整，管道固定妥善，于{0}时协助翻身拍背，Braden评分{5}分。",
)
_CORPUS_CHARACTERS = 200_000


class Documents:
    """Writes document texts. Args: `rng` for the corpus that they are cut from."""

    def __init__(self, rng: np.random.Generator):
        parts, length = [], 0
        while length < _CORPUS_CHARACTERS:
            kinds = rng.integers(0, len(_SENTENCES), 256).tolist()
            numbers = rng.integers(1, 99, (256, 10)).tolist()
            block = [_SENTENCES[k].format(*n) for k, n in zip(kinds, numbers, strict=True)]
            parts.extend(block)
            length += sum(map(len, block))
        self._corpus = "".join(parts)

    def text(self, rng: np.random.Generator, heading: str, nbytes: int) -> str:
        """Returns a text of about `nbytes` bytes of UTF-8 that begins with `heading`."""
        count = max(min(nbytes * 2 // 5, _CORPUS_CHARACTERS // 2), 40)  # 2.5 bytes a character.
        start = int(rng.integers(0, len(self._corpus) - count))
        return f"{heading}\n{self._corpus[start : start + count]}\n（以下签名）"
