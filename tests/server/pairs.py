r"""Pairs of answers and whether they are equal, after the public conventions of answer checking.

A line of ``answers/*.txt`` is a reference and what is equal to it or not:
``\frac{1}{2} === 0.5 === 50\% =/= 2 =/= 0.55``.
"""

import re
from pathlib import Path


def _read(sign: str) -> list[tuple[str, str]]:
    found = []
    for path in sorted((Path(__file__).parent / "answers").glob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            reference, *rest = re.split(" (===|=/=) ", line)
            answers = zip(rest[::2], rest[1::2], strict=True)
            found += [(reference, answer) for relation, answer in answers if relation == sign]
    return found


EQUAL, UNEQUAL = _read("==="), _read("=/=")
