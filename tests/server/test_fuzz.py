"""Answers made from references by rules: some that must not be equal, some that must.

A thousand of each by default, `JUDGE_FUZZ=10000` for more; `JUDGE_FUZZ_SEED` for others.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from math import gcd

import pytest

pytest.importorskip("math_verify")

from server.math import equivalence

COUNT = int(os.environ.get("JUDGE_FUZZ", "1000"))
SEED = os.environ.get("JUDGE_FUZZ_SEED", "answers")

# A reference with the numbers a, b, c, and other forms of it; each number matters.
FORMS = [
    r"{a} === {a}.0 === \frac{{{2a}}}{{2}} === {a}\text{{ units}} === x={a} === {a} ways",
    r"-{a} === -{a}.00 === x = -{a} === -\frac{{{3a}}}{{3}} === 0-{a}",
    r"\frac{{{a}}}{{{p}}} === {a}/{p} === \dfrac{{{2a}}}{{{2p}}} === x=\frac{{{a}}}{{{p}}}",
    r"{a}.{p} === {a}.{p}0 === \frac{{{a}{p}}}{{100}} === x = {a}.{p} === {a}\frac{{{p}}}{{100}}",
    r"{a}\% === {a} \% === {a}\text{{ percent}} === \frac{{{a}}}{{100}}",
    r"{a}\sqrt{{{p}}} === \sqrt{{{p}}}\cdot {a} === \sqrt{{{aap}}} === {a} \cdot {p}^{{1/2}}",
    r"{a}\pi+{b} === {b}+{a}\pi === \pi \cdot {a} + {b} === {b} + {a}π",
    r"2^{{{a}}} === 2\cdot 2^{{{am}}} === \frac{{2^{{{ap}}}}}{{2}} === 2**{a}",
    r"\log_{{{p}}} {a} === \frac{{\ln {a}}}{{\ln {p}}} === \log_{{{p}}}({a})",
    r"\binom{{{n}}}{{3}} === \frac{{{n}!}}{{3!({n}-3)!}} === {{{n} \choose 3}} === C_{{{n}}}^3",
    r"{a}^\circ === {a} degrees === {a}° === {a}\text{{ degrees}} === {a}^{{\circ}}",
    r"{a}\text{{ cm}}^2 === {a} === {a} cm^2 === {a}\text{{ square centimeters}}",
    r"{a}\text{{ m/s}} === {a}\mathrm{{~m}} / \mathrm{{s}} === {a} m/s === {a} meters per second",
    r"{a}+{b}i === {b}i+{a} === i({b}-{a}i) === z={a}+{b}i",
    r"{a}x+{b} === {b}+{a}x === {b} + x \cdot {a} === ({a}x+{b}) === \frac{{{2a}x+{2b}}}{{2}}",
    r"x^2+{a}x-{b} === {a}x+x^2-{b} === x(x+{a})-{b} === -{b} + x^2 + {a}x",
    r"(x+{a})(x-{b}) === x^2+{a}x-{b}x-{ab} === (x-{b})(x+{a}) === ({a}+x)(x-{b})",
    r"\frac{{x+{a}}}{{x-{b}}} === \frac{{-x-{a}}}{{{b}-x}} === (x+{a})/(x-{b})",
    r"\sqrt{{x+{a}}}+{b} === (x+{a})^{{1/2}}+{b} === {b}+\sqrt{{{a}+x}}",
    r"\ln(x+{a})-{b} === -{b}+\ln({a}+x) === \ln\left(x+{a}\right)-{b}",
    r"{a}\sin({p}x) === {a} \sin {p}x === {2a}\sin({p}x)/2 === \sin({p} x) \cdot {a}",
    r"e^{{{a}x}}+{b} === {b}+e^{{{a}x}} === (e^x)^{{{a}}}+{b} === \exp({a}x)+{b}",
    r"{a}n!+{b} === {b}+{a}\cdot n! === {b}+n!\cdot{a} === {a}n(n-1)!+{b}",
    r"\frac{{-{b}+\sqrt{{{b}+{a}n}}}}{{2}} === \frac{{\sqrt{{{a}n+{b}}}-{b}}}{{2}}",
    r"n{p}^{{n-{a}}} === n\cdot {p}^{{n-{a}}} === \frac{{n{p}^n}}{{{p}^{{{a}}}}}",
    r"({a},{b}) === \left({a}, {b}\right) === (x,y)=({a},{b}) === x={a}, y={b} === ({a}.0, {b})",
    r"({a},{b},{c}) === \langle {a},{b},{c}\rangle"
    r" === \begin{{pmatrix}}{a}\\{b}\\{c}\end{{pmatrix}}",
    r"\begin{{pmatrix}}{a}&{b}\\{c}&7\end{{pmatrix}} === [[{a},{b}],[{c},7]] === [{a},{b};{c},7]"
    r" === \begin{{bmatrix}} {a} & {b} \\ {c} & 7 \end{{bmatrix}}",
    r"\{{{a},{u}\}} === \{{{u},{a}\}} === \left\{{{a}, {u}\right\}}",
    r"{a},{u} === {u}, {a} === {a} \text{{ and }} {u} === x={a} \text{{ or }} x={u}",
    r"x={a},x=-{b} === x=-{b} or x={a} === x_1={a}, x_2=-{b} === {a}, -{b}",
    r"[{a},{u}) === {a}\le x<{u} === \left[{a},{u}\right) === x\ge {a}, x<{u} === x\in[{a},{u})",
    r"(-\infty,-{a}]\cup[{b},\infty) === x\le -{a} \text{{ or }} x\ge {b}"
    r" === [{b},\infty)\cup(-\infty,-{a}]",
    r"x>{a} === ({a},\infty) === {a}<x === {2a}<2x === x-{a}>0 === \{{x \mid x>{a}\}}",
    r"|x-{a}|<{b} === ({a}-{b},{a}+{b}) === {a}-{b}<x<{a}+{b} === -{b}<x-{a}<{b}",
    r"y={a}x+{b} === y-{a}x={b} === {b}+{a}x=y === 2y={2a}x+{2b} === y={b}+{a}x",
    r"{a}x+{p}y=1 === {p}y+{a}x=1 === 1={a}x+{p}y === {2a}x+{2p}y=2 === {a}x+{p}y-1=0",
    r"(x-{a})^2+(y+{b})^2={c} === (y+{b})^2+(x-{a})^2={c} === {c}=(x-{a})^2+(y+{b})^2",
    r"y>{a}x+{b} === y-{a}x>{b} === {a}x+{b}<y === 2y>{2a}x+{2b}",
    r"f({a})>{b} === {b}<f({a})",
    r"x\approx {a}.{p} === {a}.{p} === x={a}.{p} === x \approx {a}.{p}",
    r"\int_0^{{{a}}}x^{{{q}}}\,dx === \int_{{0}}^{{{a}}} x^{{{q}}} dx",
    r"\sum_{{k=1}}^{{{a}}}k={T} === \sum_{{k=1}}^{{{a}}} k = {T}",
    r"x\equiv {a}\pmod{{97}} === x={a}+97k === x\equiv {a}-97 \pmod{{97}}"
    r" === x=97m+{a}, m\in\mathbb{{Z}}",
    r"x=\frac{{\pi}}{{{q}}}+{p}k\pi, k\in\mathbb{{Z}}"
    r" === x=\frac{{\pi}}{{{q}}}+{p}n\pi, n\in\mathbb{{Z}}"
    r" === \frac{{\pi}}{{{q}}}-{p}m\pi \text{{ where }} m \text{{ is an integer}}",
    r"{a}:{p}:1 === {a} : {p} : 1 === {2a}:{2p}:2",
    r"{a}\mathbf{{i}}-{b}\mathbf{{k}} === ({a},0,-{b}) === \langle {a}, 0, -{b}\rangle",
    r"{a}\begin{{pmatrix}}1\\{b}\end{{pmatrix}} === \begin{{pmatrix}}{a}\\{ab}\end{{pmatrix}}",
    r"f(x)={a}x^3+{b} === y={a}x^3+{b} === {b}+{a}x^3 === f(x)={b}+{a}x^3",
    r"\frac{{{a}}}{{x}}+C === C+\frac{{{a}}}{{x}} === {a}x^{{-1}}+c",
    r"{a}\text{{ hours }}{p}\text{{ minutes}} === {a} h {p} min === {a} hours {p} minutes",
    r"\begin{{cases}}x={a}\\y=-{b}\end{{cases}} === ({a},-{b})"
    r" === \left\{{\begin{{array}}{{l}}x={a}\\y=-{b}\end{{array}}\right.",
]
KEYS = [  # true of everything, or of nothing
    r"\sin^2x+\cos^2x=1", "0.1x+0.2y=0.1(x+2y)", "0.3x=0.1x+0.2x", "x=x", "1=1", "0=0", "y=y",
    r"\frac{x+y}{3}=\frac x3+\frac y3", r"\frac{x}{x}=1", "(x+1)^2=x^2+2x+1", "0.1x+0.7y>0.1(x+7y)",
    "x-x=0", "x^2>-1", r"e^xe^{-x}=1", "x", "y", "n", "1>0", "x<x", "0<1<2", r"x\approx", "x=x+1",
    r"\ln e^x=x", "(x-y)(x+y)=x^2-y^2", r"\int_0^1x\,dx=5", r"x\approx x", "a", r"x\ne x", "x^0=1",
    r"\tan x=\frac{\sin x}{\cos x}", "2(x+y)=2x+2y", "0x=0", r"\mathbb{C}", r"\{x\mid x=x\}", "k",
    r"\lim_{x\to0}\frac{\sin x}{x}=3", r"k,k\in\mathbb{Z}", r"x\equiv 0\pmod 1", "()", "[]", "x,y",
]  # fmt: skip
WORDS = (
    "doubled,tripled,halved,squared,twice,quadrillion,lakh,crore,thirty,thousandths,negated,"
    "inverted,reciprocal,rounded up,or so,plus one,minus one,or seven,times ten,over two,at most,"
    "out of ten,to the fourth,if not more,at least,or fewer,is wrong,is not right,less one,ish,"
    "mod five,dozens,nines,in base nine,in reverse,upside down,point five,and a half,but not"
)


def hedged(gold: str, other: str, rng: random.Random) -> str:
    """The reference with another answer beside it, or with words that change it."""
    hedges = [
        "{0} or {1}", r"{0} \text{{ or }} {1}", "{0}, {1}", "{1}, {0}", "{0}; {1}", "{0} and {1}",
        "{0} (or {1})", r"{0}\text{{ or maybe }}{1}", "{0} = {1}", r"\boxed{{{0}}}, \boxed{{{1}}}",
        r"{0} \neq {1}", "{0} / {1}", "either {0} or {1}", "{0}, not {1}", "{0} but {1}", "{0}+{1}",
        "not {0}", r"\{{{0}\}}\cup\{{{1}\}}", "{0} {1}", "{0} \\pm 1", "{0}, {0}+1", "{0}...{1}",
    ]  # fmt: skip
    if rng.random() < 0.3 and gold.isdigit():
        return f"{gold} {rng.choice(WORDS.split(','))}"
    return rng.choice(hedges).format(gold, other)


def forms(form: str, numbers: dict[str, int]) -> list[str]:
    """The reference and its other forms, with these numbers in them."""
    a, b, p = numbers["a"], numbers["b"], numbers["p"]
    derived = {"2a": 2 * a, "3a": 3 * a, "2b": 2 * b, "2p": 2 * p, "ab": a * b, "aap": a * a * p,
               "am": a - 1, "ap": a + 1, "T": a * (a + 1) // 2, "u": a + b, "n": a + 6}  # fmt: skip
    return form.format(**numbers, **derived).split(" === ")


def draw(rng: random.Random) -> dict[str, int]:
    """Numbers of a reference: p is a prime, so that fractions and roots are in lowest terms."""
    p = rng.choice([11, 13, 17, 19, 23])
    a = next(a for a in iter(lambda: rng.randint(2, 90), 0) if gcd(a, p) == 1)
    return {
        "a": a,
        "b": rng.randint(2, 90),
        "c": rng.randint(2, 90),
        "p": p,
        "q": rng.choice([3, 5]),
    }


def wrong_pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    """A reference and what isn't equal to it."""
    while True:
        form, numbers = rng.choice(FORMS), draw(rng)
        gold, *others = forms(form, numbers)
        used = [name for name in numbers if re.search(rf"\{{[23]?{name}\}}", form)]
        name = rng.choice(used or ["a"])
        more = rng.choice([n for n in range(1, 6) if (numbers[name] + n) % numbers["p"]])
        new = {"p": rng.choice([97, 101]), "q": 7}.get(name, numbers[name] + more)
        changed = rng.choice(forms(form, {**numbers, name: new}))
        kind = rng.random()
        if kind < 0.5:
            yield gold, changed
        elif kind < 0.75:
            yield gold, rng.choice(KEYS)
        else:
            yield gold, hedged(rng.choice([gold, *others]), changed, rng)


def right_pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    """A reference and another form of it, wrapped as models and data sets do."""
    wraps: list[Callable[[str], str]] = [
        str, lambda s: f"${s}$", lambda s: rf"\boxed{{{s}}}", lambda s: f"{s}.",
        lambda s: rf"\({s}\)", lambda s: f"The answer is ${s}$.", lambda s: f"$${s}$$",
        lambda s: s.replace(",", ", "), lambda s: s.replace(r"\frac", r"\dfrac"),
    ]  # fmt: skip
    while True:
        gold, *others = forms(rng.choice(FORMS), draw(rng))
        yield gold, rng.choice(wraps)(rng.choice(others or [gold]))


def test_no_answer_made_wrong_is_called_right() -> None:
    pairs = wrong_pairs(random.Random(f"wrong {SEED}"))
    found = [
        pair for _, pair in zip(range(COUNT), pairs, strict=False) if equivalence.judge(*pair).equal
    ]
    assert not found


def test_answers_rewritten_are_called_right() -> None:
    pairs = right_pairs(random.Random(f"right {SEED}"))
    drawn = [pair for _, pair in zip(range(COUNT), pairs, strict=False)]
    missed = [pair for pair in drawn if not equivalence.judge(*pair).equal]
    assert len(missed) <= 0.03 * len(drawn), missed
