"""The unit at the end of an answer: taken off, and compared by name."""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache

from .phrases import PARTS, POWERS, VALUES
from .tokens import PATTERNS, UNITS, VOCABULARY, word_set

_TABLES = VOCABULARY["units"]
_FRACTIONS = "|".join((*PARTS, "hundredth", "thousandth", "millionth", "billionth"))
CHANGES = re.compile(  # words after a number that change its value, so that they are no unit
    rf"\b(?:{'|'.join(_TABLES['changes'].split())}|(?:square|sq|cubic)\Z"
    rf"|times[ *](?!(?:an?|per|each|every)\b)\w+|(?:{_FRACTIONS})s?)\b"
)
NAMES = re.compile(rf"\b(?:{'|'.join(_TABLES['named'].split())})\Z")
_NO_PLURALS = word_set(_TABLES["no_plurals"]) | {f"{word}s" for word in (*VALUES, *POWERS, *PARTS)}
_IDLE = word_set(_TABLES["idle"])
_BESIDE = word_set(_TABLES["beside"]) | word_set(_TABLES["counted"]) | _IDLE
_ANGLES = ("", "rad")
_ARCS = {"'": "arcmin", "''": "arcsec"}
_DEFINED = {unit: (Fraction((size := text.split())[0]), size[1])
            for unit, text in _TABLES["defined"].items()}  # fmt: skip
_UNIT_NAMES = dict(re.findall(r"(\w+):(\S*)", _TABLES["spelt"]))
_MEASURES = {unit.lower().removesuffix("s") for unit in UNITS} | {*_UNIT_NAMES.values()}
_UNIT_WORDS = {unit.lower() for unit in UNITS} | _BESIDE | {*_UNIT_NAMES, *_UNIT_NAMES.values()}


def split_unit(text: str) -> tuple[str, str]:
    r"""An answer without the unit at its end, and that: ``("10", "cm^2")`` of ``10\text{cm}^2``."""
    if text[-1:].isdigit() and "^" not in text[-4:]:
        return text, ""
    if match := PATTERNS.two_units.fullmatch(text):  # 2 min 30 s
        (large, of), (small, also) = (_measure(_singular(match[n])) for n in (2, 4))
        if (of == also and large > small) or match[2] == "°":
            ratio = large / small if match[2] != "°" else 60
            unit = _singular(match[4]).replace("''", "in")
            seconds = Fraction(match[5] or 0) / 60
            return str(int(match[1]) * ratio + Fraction(match[3]) + seconds), unit
    if text[-1:] == "'" and (match := PATTERNS.primes.fullmatch(text)):
        return match[1], match[2]
    text = PATTERNS.compound.sub(_compound, text)
    match = PATTERNS.unit.search(text[-80:]) if len(text) > 1 else None
    if not match:
        return text, ""
    body = text[: len(text) - len(match[0])].replace(f"{match[0]},", ",").strip()
    name = (match["text"] or match["known"] or match["words"] or "").lower()
    product = PATTERNS.times.sub("*", name.strip(" ()").replace(" per ", "/"))
    name = product if name[:1] != "-" else "2"
    measured = PATTERNS.measured.search(body + "|" * bool(match["text"]))
    bare = not measured or body.endswith(("\\", "^", "_", "="))
    if bare or CHANGES.search(name) or PATTERNS.no_unit.search(name):
        return text, ""
    power_word, _, rest = name.partition("*")
    if power_word in POWERS:  # 5 million people
        body, name = rf"{body}\cdot10^{{{POWERS[power_word]}}}", rest
    power = (match["power"] or "").strip("^{}")
    return body, _canonical(f"{name}^{power}" if power else name)


def _compound(match: re.Match[str]) -> str:
    """A product or quotient of units in one text."""
    text = f"{match[1]}/{match[2]}" if match[1] else match[3]
    bare = PATTERNS.wrapping.sub("", text).strip().replace(" per ", "/")
    return rf"\text{{{PATTERNS.times.sub('*', bare)}}}"


def _canonical(name: str) -> str:
    """The units of a product or quotient with their powers, in order: g*m^-3."""
    name = re.sub(r"\b(sq(?:uare)?|cubic|cu)(?:\*|\.\*?|(?=[a-z]{4}))([a-z]+)",
                  lambda m: f"{m[2]}^{2 if m[1][0] == 's' else 3}", name)  # fmt: skip
    powers: Counter[str] = Counter()
    name = name.replace("in*total", "")
    for before, word, power in re.findall(r"([/*]*)([a-z°'.]+)(?:\^(-?\d))?", name):
        if word not in _IDLE:
            sign = -1 if "/" in name[: name.index(before + word) + len(before)] else 1
            powers[_singular(word.replace(".", ""))] += sign * int(power or 1)
    return "*".join(f"{unit}^{n}" if n != 1 else unit for unit, n in sorted(powers.items()) if n)


@lru_cache
def _measure(unit: str) -> tuple[Fraction, tuple]:
    """The size of a unit, and the powers of those that it is defined by."""
    size, powers = Fraction(1), Counter[str]()
    for factor in unit.split("*"):
        name, _, exponent = factor.partition("^")
        power = int(exponent or 1)
        own, base = _DEFINED.get(name, (Fraction(1), ""))
        more, inner = _measure(base) if base else (Fraction(1), ((name, 1),))
        size *= (own * more) ** power
        for name, n in inner:
            powers[name] += n * power
    return size, tuple(sorted(item for item in powers.items() if item[1]))


def _singular(name: str) -> str:
    name = _UNIT_NAMES.get(name, name)
    return _UNIT_NAMES.get(name[:-1], name[:-1]) if name[2:] and name[-1] == "s" else name


def split_units(gold: str, pred: str) -> tuple[str, str, bool]:
    r"""Both answers without their units, and whether these differ; one unit alone doesn't."""
    items = [PATTERNS.outer_comma.split(text) for text in (gold, pred)]
    if 1 < len(items[0]) == len(items[1]):
        return _split_lists(*items)
    own, its = PATTERNS.bare_letter.fullmatch(gold), PATTERNS.bare_letter.fullmatch(pred)
    gold = own[1] if own and own[2] and not re.search("[A-Za-z]", pred) else gold
    pred = its[1] if its and not re.search("[A-Za-z]", gold) else pred
    (gold_body, gold_unit), (pred_body, pred_unit) = split_unit(gold), split_unit(pred)
    if its and its[2] and gold_unit:  # 0.15 m for 15 cm
        pred_body, pred_unit = its[1], re.sub("[{}]", "", its[3].lower() + (its[4] or ""))
    if own and own[2] and pred_unit:
        gold_body, gold_unit = own[1], re.sub("[{}]", "", own[3].lower() + (own[4] or ""))
    if pred_unit and not gold_unit and (pred[-1] == "'" or not _is_unit(pred)):
        return gold, pred, False
    if gold_unit and not pred_unit:
        pred_body = _without(pred_body, gold_unit)
    elif pred_unit and not gold_unit:
        gold_body = _without(gold_body, pred_unit)
    if "arc" in gold_unit + pred_unit:
        gold_unit, pred_unit = (_ARCS.get(unit, unit) for unit in (gold_unit, pred_unit))
    if gold_unit and pred_unit:
        (size, of), (its_size, also) = map(_measure, (gold_unit, pred_unit))
        if of == also and size != its_size:  # 4 ft is 48 in
            gold, pred = (re.sub(r",(?=\d{3})", "", body) for body in (gold_body, pred_body))
            return rf"({gold})\cdot{size}", rf"({pred})\cdot{its_size}", False
        (name, _, power), (other, _, its) = gold_unit.partition("^"), pred_unit.partition("^")
        # cents per pen are cents, red pens pens, metres per second no metres
        each = {*of} ^ {*also}
        counted = size == its_size and (each.isdisjoint(of) or each.isdisjoint(also))
        counted = counted and {*of} & {*also} and {u for u, _ in each} <= _UNIT_WORDS - _MEASURES
        return gold_body, pred_body, not counted if name and other else power != its  # units^2
    angles = map(PATTERNS.trigonometric.search, (gold_body, pred_body))
    ends = zip((gold_body[-1:], pred_body[-1:]), angles, strict=True)
    signs = [end if end in ("%", "°") and not angle else "" for end, angle in ends]
    if "rad" in (gold_unit, pred_unit) and signs[0] != signs[1]:  # no degree sign is left out
        return rf"0°+({gold_body})", rf"0°+({pred_body})", False
    return gold_body, pred_body, signs[0] != signs[1] and gold_unit + pred_unit not in _ANGLES


def _split_lists(gold: list[str], pred: list[str]) -> tuple[str, str, bool]:
    """Two lists item by item, in order or by units that differ."""
    units = [[split_unit(item)[1] for item in side] for side in (gold, pred)]
    if len({*units[0]}) == len(gold) and sorted(units[0]) == sorted(units[1]):  # 5 cm, 7 kg
        pred = [pred[units[1].index(unit)] for unit in units[0]]
    triples = [split_units(*pair) for pair in zip(gold, pred, strict=True)]
    own, its, differ = zip(*triples, strict=True)
    kind = "({})" if len({*units[0]}) > 1 else "{}"
    own, its = (re.sub(r",(?=\d{3})", "", ";".join(side)) for side in (own, its))
    return kind.format(own.replace(";", ",")), kind.format(its.replace(";", ",")), any(differ)


def _is_unit(text: str) -> bool:
    """Whether all words after a number are known, or in the plural: 36 apples, not 36 lakh."""
    match = PATTERNS.unit.search(text[-80:])
    words = re.findall(r"(?<!\\)\b[a-z.]+", match[0].lower()) if match else []
    if words and match["power"] and words[-1].removesuffix("s") not in {"unit", *_MEASURES}:
        return False
    return all(
        word in _UNIT_WORDS
        or (len(word) > 3 and word[-1] == "s" and word not in _NO_PLURALS
            and not re.search(r"(?<!mon)(?<!leng)(?<!pa)ths|tys|teens|folds|illions", word))
        for word in words
    )  # fmt: skip


def _without(body: str, unit: str) -> str:
    shorter = body[: -len(unit)].rstrip()
    return shorter if body.lower().endswith(unit) and re.search(r"[\d})]\Z", shorter) else body
