"""CountDown: combine numbers with + - * / to make a target. Nothing of a response is executed."""

import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PRECEDENCE = {")": 1, "+": 1, "-": 1, "*": 2, "/": 2, "sign -": 3}
ALLOWED = frozenset("0123456789+-*/() \t\r\f\v")
TOKEN = re.compile(r"[0-9]+|[-+*/()]")
# What a prompt ends with; responses alone hold neither.
ASSISTANT_MARKS = ("Assistant:", "<|im_start|>assistant")


def compute_score(solution_str: str, ground_truth: Any) -> dict[str, float]:
    """1 if the answer uses each number exactly once and makes the target, else 0. The answer is the
    last ``<answer>…</answer>`` on the last line, after the first ``Assistant:`` (or
    ``<|im_start|>assistant``) if there is one. It holds nothing but ASCII digits, + - * / ( ) and
    whitespace. Signs are right, also before brackets (``3-(-8)``); ``**``, ``//``, leading zeros
    and ``= target`` are wrong. Raises: ValueError unless `ground_truth` is
    ``{"target": int, "numbers": sequence or array of int >= 0}``. Example:
    ``<answer> 8 * 3 </answer>`` is right for ``{"target": 24, "numbers": [3, 8]}``."""
    target, numbers = _read_ground_truth(ground_truth)
    answer = extract_answer(solution_str)
    correct = float(answer is not None and _is_solution(answer, target, numbers))
    return {"score": correct, "acc": correct}


def extract_answer(solution_str: str) -> str | None:
    """The text within the last ``<answer>…</answer>`` on the last line; None without one."""
    for mark in ASSISTANT_MARKS:
        _, found, rest = solution_str.partition(mark)
        if found:
            solution_str = rest
            break
    line = solution_str.strip().rpartition("\n")[2]
    # As the regular expression <answer>(.*?)</answer> has it, but always in linear time.
    for text in reversed(line.split("</answer>")[:-1]):
        _, found, answer = text.partition("<answer>")
        if found:
            return answer.strip()
    return None


def evaluate(tokens: Sequence[str]) -> Fraction | None:
    """Exact value of an infix expression, without recursion; None if it has none."""
    values: list[Fraction] = []
    pending = ["("]  # operators and brackets still open; this one is closed by the final ")"
    operand_next = True
    try:
        for token in (*tokens, ")"):
            if operand_next and token in ("+", "-"):
                pending += ["sign -"] * (token == "-")
                continue
            is_operand = token == "(" or token.isdigit()
            if is_operand != operand_next or not pending:
                return None
            operand_next = token == "(" or token in OPERATIONS
            if token.isdigit():
                values.append(Fraction(int(token)))
                continue
            while token != "(" and PRECEDENCE.get(pending[-1], 0) >= PRECEDENCE[token]:
                operation, right = pending.pop(), values.pop()
                left = Fraction(0) if operation == "sign -" else values.pop()
                values.append(OPERATIONS[operation[-1]](left, right))
            if token == ")":
                pending.pop()
            else:
                pending.append(token)
    except ZeroDivisionError:
        return None
    return None if pending else values[0]


def _is_solution(answer: str, target: int, numbers: list[int]) -> bool:
    # Brackets can be nested without need, so this bound is a choice: many times what anybody needs.
    if len(answer) > 1000 + 10 * len(str(numbers)) or not ALLOWED.issuperset(answer):
        return False
    tokens = TOKEN.findall(answer)
    # Compared as text: a leading zero differs, and only numbers of known size become integers.
    if sorted(t for t in tokens if t.isdigit()) != sorted(map(str, numbers)):
        return False
    return evaluate(tokens) == target


def _read_ground_truth(ground_truth: Any) -> tuple[int, list[int]]:
    try:
        target, numbers = ground_truth["target"], ground_truth["numbers"]
        ordered = isinstance(numbers, (Sequence, np.ndarray)) and not isinstance(numbers, bytes)
        plain = not any(isinstance(n, bool) for n in (target, *numbers))
        target, numbers = operator.index(target), [operator.index(n) for n in numbers]
        valid = ordered and plain and min(numbers, default=-1) >= 0
    except (TypeError, KeyError, IndexError):
        valid = False
    if not valid:
        form = "{'target': int, 'numbers': non-empty sequence of int >= 0}"
        raise ValueError(f"the ground truth of countdown must be {form}, not {ground_truth!r:.200}")
    return target, numbers
