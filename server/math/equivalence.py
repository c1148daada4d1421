r"""Whether a model's answer equals the reference answer, in stages, the cheap ones first.

identical → normalised strings → exact numbers → structures → expressions (60-digit sampling, then
math-verify). The first stage that can tell settles the pair, and the verdict names it.

>>> judge(r"\frac{3}{5}", "0.6")
Verdict(equal=True, how='numeric', status='ok')

Answers are hostile input: nothing is evaluated as code, depth and sizes are limited, but only for
:func:`quick` the time: :func:`judge` belongs in a process that can be killed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from . import regions, structures, symbolic
from .evaluate import TooLarge, Undecided, exact
from .normalise import normalise, words
from .tokens import FUNCTIONS, GREEK, PATTERNS, RULES, ParseError, TooComplex
from .tree import Node, parse
from .units import CHANGES, NAMES, split_units
from .values import same_values

MAX_QUICK = 200  # characters of a normalised answer that are parsed on the event loop
MAX_LENGTH = 5_000  # characters of an answer that are read at all
_PARITY = {"odd": r"2k+1,k\in\mathbb{Z}", "even": r"2k,k\in\mathbb{Z}"}
_READINGS = [(re.compile(text), *rest) for text, *rest in RULES["readings"]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for one pair, such as ``Verdict(True, "numeric", "ok")``."""

    equal: bool
    how: str  # the stage that decided: identical, normalised, numeric, structure or symbolic
    # ok, unparsable (no stage could read it), undecided (not understood, or can't be told apart)
    status: str = "ok"


def judge(gold: str, pred: str) -> Verdict:
    """Whether ``pred`` equals the reference ``gold``; may take long, see the module."""
    if verdict := quick(gold, pred):
        return verdict
    gold, pred = cache_key(gold, pred)
    verdict = _slow(gold, pred)
    if verdict == Verdict(False, verdict.how) and symbolic.unread(gold, pred):
        return Verdict(False, verdict.how, "undecided")
    return verdict


def _slow(gold: str, pred: str) -> Verdict:
    """The verdict of the later stages on a normalised pair."""
    texts = (PATTERNS.label.sub(_named, _PARITY.get(words(text), text)) for text in (gold, pred))
    gold, pred, units_differ = split_units(*texts)
    if units_differ or symbolic.unfinished(gold, pred):
        return Verdict(False, "normalised")
    try:
        return _compare(gold, pred)
    except TooLarge:
        return Verdict(False, "symbolic", "undecided")
    except (TooComplex, RecursionError):
        return Verdict(False, "symbolic", "unparsable")
    except (ParseError, Undecided):
        pass
    try:
        equal = symbolic.equal(gold, pred)
    except MemoryError:
        raise
    except Exception:  # the library raises anything on input it can't handle
        equal = None
    return Verdict(bool(equal), "symbolic", "unparsable" if equal is None else "ok")


def _named(match: re.Match[str]) -> str:
    """Words before a value as its name: "smallest: 2" as smallest = 2, and so "house number 2"."""
    name = PATTERNS.label_filler.sub("", match[1].lower())
    changed = CHANGES.search(name) or not {*re.findall("[a-z]{3,}", name)} - GREEK
    labels = {found[1].lower() for found in PATTERNS.label.finditer(match.string)}
    changed = changed or not (match[2] or NAMES.search(name) or len(labels) > 1)
    rest = re.split("[,;]", match.string[match.end() :])[0]
    if changed or (not match[2] and match[1] in FUNCTIONS and rest[:1] in "([{\\"):  # \max(a, b)
        return match[0]
    return "" if "=" in rest else rf"\text{{{name}}}="


def quick(gold: str, pred: str) -> Verdict | None:
    """The verdict of the string and exact-number stages, linear in the lengths, or None."""
    if gold == pred and gold.strip():
        return Verdict(True, "identical")
    readable = max(len(gold), len(pred)) <= MAX_LENGTH
    gold, pred = cache_key(gold, pred) if readable else ("", "")
    if not gold or not pred:
        return Verdict(False, "normalised", "unparsable")
    if _tight(gold) == _tight(pred) or (words(gold) and words(gold) == words(pred)):
        return Verdict(True, "normalised")
    chosen = _choice(gold, gold), _choice(pred, gold)
    if all(chosen) and (len(gold + pred) > 2 or gold.lower() == pred.lower() < "f"):
        (letter, option), (other, its_option) = chosen
        if letter != other or not (option and its_option):
            alike = letter == other and not _unclear(letter, option + its_option)
            return Verdict(alike, "normalised")
    if PATTERNS.doubt.search(pred) and not PATTERNS.doubt.search(gold):
        return Verdict(False, "normalised", "undecided")
    if max(len(gold), len(pred)) > MAX_QUICK:
        return None
    return _numeric(gold, pred)


def _tight(text: str) -> str:
    """Without spaces and text commands, except for spaces between digits."""
    text = re.sub(r"(?<=[a-z]{3}):", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", text))
    text = re.sub(r"(?<!\d) | (?!\d)", "", text)
    return "".join(sorted(re.findall("[A-H]", text))) if PATTERNS.several.fullmatch(text) else text


def _unclear(letter: str, option: str) -> bool:
    """Whether the text of a choice may name another one, or leave doubts."""
    earlier = PATTERNS.earlier.fullmatch(option) and max(re.findall("[A-I]", option)) < letter
    return bool((PATTERNS.unsure if letter[1:] else PATTERNS.second).search(option)) and not earlier


def _choice(text: str, gold: str) -> tuple[str, str] | None:
    """The letter of a choice and its text, or yes or no and its reason; a, b only for a letter."""
    starts = text[:6] == r"\text{" or text[:1] in "(ABCDEFGHIJabcdefghijYyNnTt"
    if spoken := starts and PATTERNS.spoken.fullmatch(re.sub(r"\\text\{|\}", " ", text).strip()):
        return "yes" if spoken[1] else "no", spoken[2]
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text) if starts else ""
    match = PATTERNS.choice.fullmatch(bare)
    if not match or not match[2] or match[1].isupper():
        return (match[1].upper(), match[2]) if match else None
    listed = len(gold.strip("()")) == 1 and re.match(r"\(?[a-j][).:][^^_*/=+(,]", bare)
    option = re.sub(r"(?<![A-Za-z\\])[a-j](?=[).]|\Z)", lambda m: m[0].upper(), match[2])
    return (match[1].upper(), option) if listed else None


def cache_key(gold: str, pred: str) -> tuple[str, str]:
    """The normalised pair: pairs with the same key get the same verdict."""
    gold = PATTERNS.displayed.sub(r"\1", gold) if "$$" in gold else gold
    pair = [normalise(gold), normalise(pred)]
    if pair[0] != pair[1] and (". The " in gold or gold[:3] in ("If ", "Sol", "Set")):
        pair[0] = normalise(PATTERNS.conclusion.sub(r"\1", gold))
    heads = [PATTERNS.quantity.match(text) for text in pair]
    if heads.count(None) == 1:
        pair = [text[its.end() :] if its else text for its, text in zip(heads, pair, strict=True)]
    if "P(" in pair[0] and "P(" in pair[1]:
        name, other = ({*PATTERNS.event.findall(text)} for text in pair)
        if len(name) == len(other) == 1:
            pair = [PATTERNS.event.sub(f"P({min(name)}", text) for text in pair]
    chosen = [_choice(text, pair[0]) for text in pair]
    named = [choice for choice in chosen if choice]
    clear = all(option and len(name) == 1 and not _unclear(name, option) for name, option in named)
    if clear and len({name for name, _ in named}) == 1:  # (C) green for green
        pair = [normalise(its[1]) if its else text for its, text in zip(chosen, pair, strict=True)]
    dated = all(re.search("'_[tx]", text) for text in pair)  # dy/dx isn't dy/dt
    return tuple(text if dated else re.sub("(?<=')_[tx]", "", text) for text in pair)


def preload() -> None:
    """Import what the expensive stages need, so that no task pays for it."""
    symbolic.equal("1", r"\int_0^1 1 dx")


def _numeric(gold: str, pred: str) -> Verdict | None:
    """Two numbers with an exact value, whatever their notation."""
    times = PATTERNS.clock.fullmatch(gold), PATTERNS.clock.fullmatch(pred)
    if all(times) and (times[0][4] or times[1][4] or not (times[0][3] or times[1][3])):
        return Verdict(_same_times(*times), "normalised")
    gold, pred, units_differ = split_units(gold, pred)
    if units_differ:
        return Verdict(False, "normalised")
    try:
        trees = parse(gold), parse(pred)
        bare = [tree.args[0] if tree.op == "degree" else tree for tree in trees]
        if None not in map(exact, bare):
            return Verdict(same_values(*trees), "numeric")
    except (ParseError, Undecided, RecursionError):
        pass
    return None


def _same_times(*times: re.Match[str]) -> bool:
    """Whether two times of day are the same; a.m. or p.m. may be missing."""
    (hour, half), (other, its) = ((int(time[1]), (time[4] or "").lower()) for time in times)
    alike = hour == other < 13 and (half == its or "" in (half, its))
    hours = (n % 12 + 12 * (half == "p") if half else n for n, half in ((hour, half), (other, its)))
    parts = ([int(part or 0) for part in time.group(2, 3)] for time in times)
    return (alike or len({*hours}) == 1) and next(parts) == next(parts)


def _compare(gold: str, pred: str) -> Verdict:
    """The structural stages, on both readings of commas between digits."""
    trees = (parse(text) for text in (gold, pred))
    own, pred_tree = map(regions.written_out, trees) if r"\ldots" in gold + pred else trees
    first, *others = structures.forms(own)
    trees = first, pred_tree
    how = "structure" if any(tree.op in structures.COMPOUND for tree in trees) else "symbolic"
    parts = first.args if ";" in gold and first.op == "list" else ()
    ordered = parts and not {part.op for part in parts} & {*structures.COMPOUND, "sym", "pm"}
    family = regions.same_families(*trees) if PATTERNS.family.search(gold + pred) else None
    if (family and not ordered) or any(structures.same(form, pred_tree) for form in others):
        return Verdict(True, "structure")
    if ordered:  # answers to several questions
        return Verdict(structures.same(Node("group", ("(", ")", *parts)), pred_tree), "structure")
    if family is not None:
        return Verdict(family, "structure")
    if structures.same(*trees):
        return Verdict(True, how)
    for reading in _other_readings(gold, pred, *trees):
        if structures.same(*reading):
            return Verdict(True, "structure")
    return Verdict(False, how)


def _other_readings(gold: str, pred: str, gold_tree: Node, pred_tree: Node) -> Iterator[tuple]:
    """100,200 as a list, 1,22 as a decimal, where the other side clearly is one; C(3,2) as 3."""
    lengths = [len(tree.args) if tree.op == "list" else 1 for tree in (gold_tree, pred_tree)]
    if lengths[0] != lengths[1] and ",0" not in gold + pred:
        yield parse(gold, thousands=False), parse(pred, thousands=False)
    for found, new, sign, both in _READINGS:
        apart = [found.sub(new, text) for text in (gold, pred)] if sign in gold + pred else []
        if apart and ((apart[0] == gold) != (apart[1] == pred) or (both and apart[0] != gold)):
            yield tuple(map(parse, apart))
    for text, other in ((gold, pred_tree), (pred, gold_tree)):
        if PATTERNS.decimal_comma.fullmatch(text) and exact(other) is not None:
            yield parse(text.replace(",", ".")), other
