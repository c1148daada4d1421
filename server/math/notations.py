r"""Rules that rewrite a string, each a sign of a notation, a pattern and what stands for it.

A pattern is searched only where its sign is, so that the other answers cost nothing. ``RARE`` are
the notations that few answers hold.
"""

import re

_ARGUMENT = r"(\{[^{}]*\}|\w)"
_CALCULUS = {"": r"\tan", "c": r"\cot", "arc": r"\arctan", "arcc": r"\arccot"}
_INTEGER = r",\1\\in\\mathbb{Z}"
_TEXT = r"(?:\\text\{ ?)?"


def _repeating(match: re.Match[str]) -> str:
    """0.1(6) as a fraction: the digits up to the end of a period, less those before it."""
    whole, fixed, period = match.groups()
    numerator = int(whole + fixed + period) - int((whole + fixed) or 0)
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


RARE = [
    # degrees, temperatures, minutes of arc, a unit in brackets, ordinals
    ("^", r"(?<=[\d}])\^(?:o|\{o\})(?![A-Za-z])", "°"),
    ("prime", r"\^\{? ?\\prime ?(\\prime)? ?\}?", lambda m: "''" if m[1] else "'"),
    ("°", r"\{ ?° ?\}", "°"),
    ("°", r"(?<!\{)° ?(?:\\text\{ ?)?([CF])(?:elsius|ahrenheit)?(?![A-Za-z]) ?\}?", r"\\text{°\1}"),
    ("})", r"(?<=[\d}])\((\\text\{[A-Za-z ]*\})\)\Z", r"\1"),
    ("d", rf"(?<=\d)(?:\^? ?\{{? ?{_TEXT})(?:st|nd|rd)(?![A-Za-z]) ?\}}{{0,2}}", ""),
    ("th", rf"(?<=\d)(?:\^? ?\{{? ?{_TEXT})th(?![A-Za-z]) ?\}}{{0,2}}", ""),
    ("^{-", r"\\text\{([A-Za-z]+)(?: |\}?\\cdot ?)(?:\\text\{)?([A-Za-z]+)\}?\^\{-(\d)\}",
     lambda m: rf"\text{{{m[1]}/{m[2]}}}" + (f"^{m[3]}" if m[3] != "1" else "")),
    # bases, residues, numbers with a period or a rest
    ("_", r"_\{\((\d+)\)\}", r"_{\1}"),
    ("_", r"\A(?:\\text\{)?([0-9A-Fa-f]{2,})\}?_\{?(1[1-6])\}?\Z",
     lambda m: f"{m[1].upper()}_{m[2]}"),
    ("mod", r" ?(\( ?)?\\?(?:text\{ ?)?(?<![A-Za-z])[pb]?mod\b ?\}? ?(\d{1,9}|\{\d{1,9}\}|[a-z])"
     r"(?(1) ?\))", lambda m: rf"\pmod{{{m[2].strip('{}')}}}"),
    (".", r"(?<![\d.])(\d{0,20})\.(\d{0,20})\((\d{1,20})\)(?![\w(.^])", _repeating),
    (".", r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot)\{(\d{1,20})\}", _repeating),
    (r"\ldots", r"(\d{0,20})\.(\d{0,6}?)(\d{1,3}?)\3{2,9} ?\\ldots", _repeating),
    (r"\ldots", r"(\.\d+) ?\\ldots *\Z", r"\1"),
    (" ", r"\A-?\d{1,3}(?: \d{3})+(?:\.\d+)?\Z", lambda m: m[0].replace(" ", "")),
    (" to ", r"\A(\d+) to (\d+)\Z", r"\1:\2"),
    # lists, matrices, systems
    ("<", r"\A<([^<>=]*,[^<>=]*)>\Z", r"(\1)"),
    (")(", r"\A(?:\(\d\)){2,}\Z", lambda m: m[0].replace(")(", "),(")),
    ("[", r"\A\[([A-J](?:, ?[A-J])+)\]\Z", r"\1"),
    ("atrix(", r"(?<![A-Za-z])[Mm]atrix(?=\()", ""),
    ("cases", r",? ?&? ?\\text\{ ?(?:if|for|when) ?\}|, ?(?:&|(?=\\\\))", "&"),
    ("&", r"& ?(?=[=<>]|\\[lg]e(?![A-Za-z]))", ""),
    (r"\begin", r"\\\{ ?(?=\\begin)(?!.*\\\})", ""),
    (":", r"\A([^:]*(?:[<>]|\\[lg]e)[^:]*):(?=[\[(])", r"\1\\lor"),
    # functions with other names
    ("C", rf"(?<![A-Za-z\\])C_{_ARGUMENT}\^{_ARGUMENT}", r"\\binom{\1}{\2}"),
    ("C", rf"\{{\}}[_^]{_ARGUMENT}C_{_ARGUMENT}", r"\\binom{\1}{\2}"),
    ("_", rf"(?<![A-Za-z\\])[AP]_{_ARGUMENT}\^{_ARGUMENT}", r"\\binom{\1}{\2}{\2}!"),
    ("P", rf"\{{\}}[_^]{_ARGUMENT}P_{_ARGUMENT}", r"\\binom{\1}{\2}{\2}!"),
    ("tg", rf"{_TEXT}\\?(?<![A-Za-z])((?:arc)?c?)tg(?![a-z]) ?\}}? ?(?=(\w?))",
     lambda m: _CALCULUS[m[1]] + " " * len(m[2])),
    # for which letters something holds
    ("Z", r"(?<=\\in)[ {]*Z\}?(?=\W|\Z)", r"\\mathbb{Z}"),
    ("N", r"\A([A-Za-z](?:_\{?n\}?|\(n\))=.*?)[ ,(]*n ?\\in ?\\mathbb ?\{?N\}?[_^{}*+]*\)?\Z",
     r"\1"),
    ("mathbb", r"\\mathbb\{R\}[_^]\{?\+\}?", r"(0,\\infty)"),
    ("angle", r"m?\\angle ?(?=[A-Z]|\{[A-Z])", ""),
    ("dx", r"\\frac\{d([a-z])\}\{dx\}", r"\1'"),
    ("Z", rf"[ ,(]*{_TEXT}(?:where|for|with)?(?: (?:any|all|some))? ?\}}?([a-zA-Z]) ?\\in"
     r" ?\\mathbb ?\{?Z\}?\)?\Z", _INTEGER),
    ("integer", rf"[ ,(]*{_TEXT}(?:where|for|with)?(?: (?:any|all|every|some))? ?\}}?([a-z]) ?"
     rf"{_TEXT}(?:is |are )?(?:an |any )?integers?\}}?\)?\Z", _INTEGER),
    ("integer", rf"[ ,(]*{_TEXT}(?:for|with)(?: (?:an|any|all|every|some))? integers? ?\}}?([a-z])"
     r"\)?\}?\Z", _INTEGER),
    ("for", rf"[ ,]*{_TEXT}for (?:all|any|every)(?: real)?(?: numbers?| values of)? ?\}}?[a-z]"
     r"(?:\\in ?\\mathbb\{R\})?\}?\Z", ""),
]  # fmt: skip


class Rules:
    """Patterns to apply one after the other: ``Rules([("U", r"(?<=\)) ?U ?", r"\\cup ")])``."""

    def __init__(self, rules: list[tuple]) -> None:
        self.rules = [(sign, re.compile(pattern), new) for sign, pattern, new in rules]

    def __call__(self, text: str) -> str:
        for sign, pattern, new in self.rules:
            if sign in text:
                text = pattern.sub(new, text)
        return text
