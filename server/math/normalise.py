"""Strings to strings: one spelling for each of the many ways to typeset the same answer.

Nothing here understands mathematics. Every step is a linear scan (no nested quantifiers), so the
work is bounded by the length of the string, whatever the string holds.
"""

from __future__ import annotations

import re


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


FUNCTIONS = word_set(
    "sin cos tan cot sec csc sinh cosh tanh coth sech csch arcsin arccos arctan arccot arcsec "
    "arccsc arsinh arcosh artanh asin acos atan arcsinh arccosh arctanh ln log lg exp "
    "sqrt abs max min gcd lcm Re Im arg"
)
PERCENT = frozenset({"percent", "percentage", "percents", "pct"})
DEGREE = frozenset({"degree", "degrees", "deg"})

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*",
    "÷": r"\div ", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "∓": r"\mp ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "º": "°", "’": "'", "′": "'",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "，": ",", "。": ".", "：": ":", "；": ";",
}  # fmt: skip
_TABLE = str.maketrans(
    _CHARACTERS
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code - 0xFEE0 not in
       map(ord, ",.:;")}
    | {digit: f"^{{{n}}}" for n, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {digit: f"_{{{n}}}" for n, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")}
    | {chr(code): " " for code in range(32)}
)  # fmt: skip

_BOX = re.compile(r"\\(?:begin)?f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\.|[{}]")
_UNIT_AFTER_BOX = re.compile(
    r"\s*(?:\\?%|\^|°|(?:pct|percent|percentage|degrees?)(?![A-Za-z])|\\text\{)"
)
# Applied in this order; each is one linear pass.
_LAYOUT = [
    (re.compile(r"\\n(?![A-Za-z])"), " "),
    (re.compile(r"(\\\\)|\\[()\[\]]"), lambda m: m[1] or " "),
    (re.compile(r"\\?\$"), " "),
    (re.compile(r"\\(?:left|right|middle)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\[bB]igg?[lrm]?(?![A-Za-z])"), ""),
    (
        re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|hfill)(?![A-Za-z])"),
        "",
    ),
    (re.compile(r"(\\\\)|\\! *"), r"\1"),
    (re.compile(r"(?<=\d)\\[,; ](?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d)\{,\}(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), "."),
    (re.compile(r"\{([,;])\}"), r"\1"),
    (
        re.compile(r"(\\\\)|\\(?:[,;:> ]|qquad|quad|thinspace|hspace\{[^{}]*\})|~"),
        lambda m: m[1] or " ",
    ),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"<=|=<|\\leqq?(?:slant)?(?![A-Za-z])"), r"\\le "),
    (re.compile(r">=|\\geqq?(?:slant)?(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"!=|\\neq(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\(?:lor|vee|land|wedge)(?![A-Za-z])"), ","),
]
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|up|normal)?|math(?:rm|bf|it|sf|tt|cal|scr|frak|normal)|mbox|hbox"
    r"|operatorname\*?|bm|boldsymbol|emph)\s*\{([^{}]*)\}"
)
_FONT = re.compile(r"\\(?:mathrm|mathbf|mathit|rm|bf|it|text|operatorname)(?![A-Za-z{])\s*")
_WORD = re.compile(
    r"(?<![A-Za-z\\])(percent(?:age|s)?|pct|degrees?|deg|infinity|infty|inf|oo|and|or)(?![A-Za-z])"
)
_CHOICES = re.compile(r"\(?[A-Z]\)?(?:\s*,\s*\(?[A-Z]\)?)*\.?")
_NUMERAL = re.compile(r"[-+]?[\d.,:/% ]+")
_MIXED = re.compile(r"(?<![\d./])(\d{1,9}) +(\d{1,9}) ?/ ?(\d{1,9})(?![\d./])")
_REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot)\{(\d{1,20})\}")
_ANSWER_IS = re.compile(r" ?(?:(?:the )?(?:final )?answer(?: is)?|therefore|so) ?[:,]? ", re.I)
_MAXIMA = re.compile(r"(?<![\d.})\]])%(?=(?:pi|e|i)(?![A-Za-z]))")
_SPACE = re.compile(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])")
_KEPT_SPACE = re.compile(r"(\d), +(?=\d{3}(?!\d))")  # "1, 234" is a list, "1,234" may be a number

_UNITS = word_set(
    "mm cm dm km kg mg lb lbs oz ft mi yd hr hrs min mins sec secs ms mph kmh km/h m/s "
    "cents weeks days hours minutes seconds years months meters metres feet inches miles grams "
    "units dollars"
)
_UNIT = re.compile(
    r"(?:(?<=[\d})\]!a-z%]) ?\\text\{(?P<text>[^{}]*)\}"
    r"|(?<=[\d})]) ?(?P<known>"
    + "|".join(sorted(_UNITS, key=lambda unit: (-len(unit), unit)))
    + r")"
    r"|(?<=[\d})]) (?P<words>[A-Za-z]{3,}(?: [A-Za-z]+){0,4})"
    r")(?P<power>\^\{?-?\d\}?)?\Z"
)
_UNIT_LETTERS = frozenset("mgshLlKNJWVCF")
_UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m",
    "metre": "m", "kilometer": "km", "kilometre": "km", "inche": "in", "inch": "in",
    "feet": "ft", "foot": "ft", "mile": "mi", "gram": "g", "kilogram": "kg", "second": "s",
    "sec": "s", "minute": "min", "hour": "h", "hr": "h", "dollar": "", "unit": "", "liter": "l",
    "litre": "l", "pound": "lb", "yard": "yd",
}  # fmt: skip


def normalise(text: str) -> str:
    r"""The canonical spelling of an answer: layout, fonts and filler removed.

    >>> normalise(r"$\left( \dfrac{1}{2},\, 3 \right)$.")
    '(\\frac{1}{2},3)'
    """
    text = text.translate(_TABLE)
    if r"\begin" not in text:  # in an environment a double backslash ends a row
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = unbox(text)
    for pattern, replacement in _LAYOUT:
        text = pattern.sub(replacement, text)
    text = _MAXIMA.sub("", text)
    text = _FONT.sub("", _TEXT.sub(_plain_text, text))
    text = _WORD.sub(_word, text)
    text = re.sub(r"(?<=[)\]]) *U *(?=[(\[])", r"\\cup ", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", re.sub(r"\s+", " ", text).rstrip(" .,;:"))
    text = _ANSWER_IS.sub("", text, count=1) if _ANSWER_IS.match(text) else text
    text = _REPEATING.sub(_repeating, text)
    text = re.sub(r"(?: ?, ?){2,}", ",", text)
    text = _SPACE.sub("", _KEPT_SPACE.sub("\\1,\0", text)).replace("\0", " ")
    text = text.lstrip(" ,;:").rstrip(" .,;:")
    return text if text[:1] != "." or text[1:2].isdigit() else text.lstrip(".")


def unbox(text: str) -> str:
    r"""The contents of ``\boxed{…}``, with the prose around the boxes left out.

    Several boxes make a list; a per cent sign, unit or power right after the only box stays.
    """
    for _ in range(3):  # boxes in boxes
        boxes, rest, last = [], [], 0
        while match := _BOX.search(text, last):
            rest.append(text[last : match.start()])
            end = closing_brace(text, match.end())
            boxes.append(text[match.end() : end])
            last = end + 1
        if not boxes:
            break
        tail = text[last:].strip(" $.")
        if len(boxes) == 1 and _UNIT_AFTER_BOX.match(tail):
            boxes[0] += tail
        text = ",".join(boxes)
    return text


def closing_brace(text: str, start: int) -> int:
    """The index of the brace that closes the one before ``start``; the end if none does."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return len(text)


def split_unit(text: str) -> tuple[str, str]:
    r"""A normalised answer without the unit at its end, and that unit ("" if there is none).

    >>> split_unit(r"10\text{cm}^2")
    ('10', 'cm^2')
    """
    match = _UNIT.search(text[-80:]) if len(text) > 1 else None
    if not match:
        return text, ""
    body = text[: len(text) - len(match[0])].strip()
    if not body or body.endswith(("\\", "^", "_", "=")) or not re.search(r"\d|[a-zπ]\Z", body):
        return text, ""
    name = (match["text"] or match["known"] or match["words"] or "").lower().strip()
    power = (match["power"] or "").strip("^{}")
    if square := re.match(r"(sq(?:uare|\.)?|cubic|cu\.?) ", name):
        power, name = ("2" if square[1][0] == "s" else "3"), name[square.end() :]
    name = re.sub(r"[\s.]", "", name)
    name = _UNIT_NAMES.get(name, name)
    if len(name) > 2 and name.endswith("s"):
        name = _UNIT_NAMES.get(name[:-1], name[:-1])
    return body, f"{name}^{power}" if name and power else name


def split_units(gold: str, pred: str) -> tuple[str, str, bool]:
    r"""Both normalised answers without their units, and whether these contradict each other.

    A unit on one side only is no contradiction: ``5`` equals ``5\text{m}``, and so does ``5 m``.
    """
    (gold_body, gold_unit), (pred_body, pred_unit) = split_unit(gold), split_unit(pred)
    if gold_unit and not pred_unit:
        pred_body = _without(pred_body, gold_unit)
    elif pred_unit and not gold_unit:
        gold_body = _without(gold_body, pred_unit)
    return gold_body, pred_body, bool(gold_unit and pred_unit and gold_unit != pred_unit)


def _without(body: str, unit: str) -> str:
    shorter = body.removesuffix(unit).rstrip()
    return shorter if shorter != body and shorter[-1:].isdigit() else body


def words(text: str) -> str | None:
    r"""Letters of an answer made of words only, in lower case (``\text{Even}`` → even)."""
    if re.fullmatch(r"(?:[A-Za-z ,'-]|\\text\{[^{}\\]*\})+", text):
        bare = re.sub(r"\\text\{|\}|[ ,]", "", text)
        return bare.lower() if len(bare) > 1 else None
    return None


def _plain_text(match: re.Match[str]) -> str:
    r"""What ``\text{…}`` stands for: a function, a letter, a separator, a number, or words."""
    inner = match[1].strip(" .")
    lowered = inner.lower().strip(" ,")
    if inner in FUNCTIONS:
        return f"\\{inner} "
    if lowered in ("and", "or"):
        return ","
    if lowered in PERCENT:
        return "%"
    if lowered in DEGREE:
        return "°"
    before = match.string[: match.start()].rstrip()[-1:] if inner in _UNIT_LETTERS else ""
    if before.isdigit() or before == "}":
        return f"\\text{{{inner}}}"
    if (
        len(inner) <= 1
        or inner[0].isdigit()
        or _CHOICES.fullmatch(inner)
        or _NUMERAL.fullmatch(inner)
    ):
        return inner
    return f"\\text{{{inner}}}" if match[0][:5] != "\\math" or " " in inner else f" {inner}"


def _word(match: re.Match[str]) -> str:
    word = match[1]
    if word in PERCENT:
        return "%"
    if word in DEGREE:
        return "°"
    return "," if word in ("and", "or") else r"\infty "


def _repeating(match: re.Match[str]) -> str:
    """0.1(6) as a fraction: the digits up to the end of a period, less those before it."""
    whole, fixed, period = match.groups()
    numerator = int(whole + fixed + period) - int((whole + fixed) or 0)
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    return rf"\frac{{{numerator}}}{{{denominator}}}"
