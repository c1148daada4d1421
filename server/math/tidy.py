r"""One tree for what answers write in several ways, and the names that answers give to values."""

from itertools import chain, product

from .evaluate import Undecided, equal, find, has, symbols, value
from .tokens import word_set
from .tree import Node, rewritten

COLLECTIONS = ("list", "set", "group", "matrix", "det")
_TRANSPOSED = Node("sym", ("T",)), Node("sym", (r"\top",)), Node("sym", ("t",))
_POINTED = ("pow", "apply")
_NAMES = word_set("apply fn abs div ratio degree pow mul matrix row cap cup")


def tidy(node: Node) -> Node:
    r"""Without what doesn't change an answer: approximations, ``\pm``, arithmetic of matrices."""
    if node.op == "rel" and not {"~", "="}.isdisjoint(node.args[0]):
        node = _approximated(node)
    if node.op == "list" and (which := node.args[-1]).op == "rel" and which.args[0] == ("in",):
        node = _written_out(*node.args[:-1], which=which)
    if node.op == "rel" and node.args[0] == ("in",) and node.args[2].op == "set":
        node = Node("set", node.args[2].args)  # x in {1, 2}
    if node.op == "pow" and node.args[0].op in ("group", "matrix") and node.args[1] in _TRANSPOSED:
        base = node.args[0]
        rows = [row.args for row in base.args] if base.op == "matrix" else [base.args[2:]]
        node = Node("matrix", tuple(Node("row", cells) for cells in zip(*rows, strict=True)))
    if node.op == "group" and all(name_of(item) for item in node.args[2:]) and node.args[2:]:
        node = Node("list", node.args[2:])  # [x = 1, y = 2]
    if node.op == "rel" and len(node.args) > 3 and set(node.args[0]) == {"="}:
        *names, last = node.args[1:]  # x = y = 4
        if all(side.op == "sym" and _is_name(side) for side in names) and not symbols(last):
            node = Node("list", tuple(Node("rel", (("=",), name, last)) for name in names))
        elif name_of(node) and not all(_fits(side, value_of(node)) for side in node.args[2:-1]):
            node = Node("contradiction", node.args)  # y = 2x = 3x
    if node.op == "rel" and node.args[0] == ("=",):
        names, values = map(entries, node.args[1:])  # (x, y) = (1, 2)
        if len(names) == len(values) > 0 and all(map(_is_name, names)):
            pairs = zip(names, values, strict=True)
            node = Node("list", tuple(Node("rel", (("=",), *pair)) for pair in pairs))
    signs = len([*find(node, "pm"), *find(node, "mp")])
    point = node.op == "group" and node.args[0] == "("
    if signs and point and not has(node, "mp"):  # (\pm 1, \pm 5): each sign for itself
        chosen = ({_choose(end, "pm"): 0, _choose(end, "mp"): 0} for end in node.args[2:])
        node = Node("list", tuple(Node("group", ("(", ")", *ends)) for ends in product(*chosen)))
    elif signs and (point or node.op not in COLLECTIONS):
        node = Node("list", (_choose(node, "pm"), _choose(node, "mp")))
    if node.op == "mul" and [arg.op for arg in node.args] == ["sym", "group"]:
        point, at = node.args  # P(1, 2)
        node = Node("rel", (("=",), point, at)) if point.args[0].isupper() else node
    node = _linear(node)
    if node.op == "add" and len(node.args) == 2 and node.args[1].op == "neg":
        (excluded,) = node.args[1].args
        node = Node("minus", (node.args[0], excluded)) if excluded.op == "set" else node
    if node.op in ("list", "set"):
        items = map(tidy, _share_names(node.args))
        flat = chain.from_iterable(part.args if part.op == "list" else (part,) for part in items)
        node = Node(node.op, tuple(flat))
    return node


def _fits(side: Node, result: Node) -> bool:
    """Whether what stands between a name and its value may be equal to the value."""
    try:
        formula = side.op == "sym" or bool(symbols(side) and not symbols(result))
        return side == result or formula or equal(side, result)
    except Undecided:
        return True


def _approximated(node: Node) -> Node:
    r"""Without ``\approx`` and what follows, if that is near; ``x \approx 3`` with ``=``."""
    operators, sides = list(node.args[0]), list(node.args[1:])
    if operators[-1] == "=" and is_rounded(*sides[-2:]):  # 5/7 = 0.714
        operators[-1] = "~"
    while "~" in operators:
        at = operators.index("~")
        try:
            left, right = (value(side) for side in sides[at : at + 2])
            near = abs(left - right) <= abs(left) / 20 and not has(sides[at], "apply")
        except Undecided:
            near = False
        if near:
            del operators[at], sides[at + 1]
        else:
            operators[at] = "="
    return Node("rel", (tuple(operators), *sides)) if operators else sides[0]


def _written_out(*forms: Node, which: Node) -> Node:
    r"""A list of members: k\pi, k \in {0, 1} as 0, \pi."""
    name, numbers = which.args[1:]
    if numbers.op != "set" or not all({*name.args} <= symbols(form) for form in forms):
        return Node("list", (*forms, which))
    return Node("list", tuple(
        rewritten(form, lambda part, n=n: n if part == name else part)
        for n in numbers.args for form in forms
    ))  # fmt: skip


def is_rounded(exact: Node, decimal: Node) -> bool:
    """Whether the second of two numbers is the first, with some digits after the point."""
    numeral = decimal.args[0] if decimal.op == "neg" else decimal
    if numeral.op != "num" or not numeral.args[1] or symbols(exact) or has(exact, "apply"):
        return False
    try:
        return abs(value(exact) - value(decimal)) < 0.50001 / 10 ** numeral.args[1]
    except Undecided:
        return False


def entries(node: Node) -> tuple[Node, ...]:
    """The entries of a tuple, or of a matrix of one row or column; of anything else, none."""
    node = _linear(node)
    rows = node.args if node.op == "matrix" else ()
    flat = len(rows) == 1 or all(len(row.args) == 1 for row in rows)
    cells = tuple(cell for row in rows for cell in row.args) if flat else ()
    return node.args[2:] if node.op == "group" else cells


def _column(node: Node) -> Node:
    """A tuple as a matrix of one column."""
    rows = (Node("row", (item,)) for item in node.args[2:])
    point = node.op == "group" and node.args[:2] == ("(", ")") and len(node.args) > 3
    return Node("matrix", tuple(rows)) if point else node


def _linear(node: Node) -> Node:
    """Multiples and sums of matrices written out as one matrix."""
    if node.op not in ("mul", "div", "neg", "add"):
        return node
    args = [_column(_linear(arg)) for arg in node.args]
    matrices = [arg for arg in args if arg.op == "matrix"]
    shapes = {tuple(len(row.args) for row in matrix.args) for matrix in matrices}
    whole = len(matrices) == len(args) if node.op == "add" else len(matrices) == 1
    if len(shapes) != 1 or not whole or (node.op == "div" and args[0] is not matrices[0]):
        return node
    rows = (
        Node("row", tuple(
            Node(node.op, tuple(arg.args[i].args[j] if arg.op == "matrix" else arg for arg in args))
            for j in range(width)
        ))
        for i, width in enumerate(*shapes)
    )  # fmt: skip
    return Node("matrix", tuple(rows))


def _choose(node: Node, plus: str) -> Node:
    """The tree with every plus-minus sign settled: ``plus`` becomes +, the other one -."""
    minus = "mp" if plus == "pm" else "pm"
    return rewritten(node, lambda part: part.args[0] if part.op == plus
                     else Node("neg", part.args) if part.op == minus else part)  # fmt: skip


def _share_names(items: tuple[Node, ...]) -> tuple[Node, ...]:
    r"""``x = 1, 2`` or ``x \ne 1, 2``: the name of the first belongs to all."""
    if not items or items[0].op != "rel" or any(item.op == "rel" for item in items[1:]):
        return items
    operators, name, _ = items[0].args[:3]
    formulas = is_numbered(name) and any(map(symbols, items[1:]))  # a_n = 2n, n^2
    if operators == ("!=",) or (operators == ("=",) and name_of(items[0]) and not formulas):
        return (items[0], *(Node("rel", (operators, name, item)) for item in items[1:]))
    return items


def name_of(node: Node) -> Node | None:
    """What a ``name = value`` relation names, or None: a symbol, f(x), AB/CD, |AB|, (x, y)."""
    if node.op != "rel" or set(node.args[0]) != {"="}:
        return None
    first, last = node.args[1], node.args[-1]
    if _is_name(first):
        return first
    return last if last.op == "sym" and _is_name(last) else None


def _is_name(node: Node) -> bool:
    if node.op == "sym":
        return node.args[0] not in ("pi", "oo")
    if node.op == "group":
        return len(node.args) > 2 and all(map(_is_name, node.args[2:]))
    if node.op == "fn":  # \sin A, \log_x y, while \ln x = 3 is an equation
        logarithm = node.args[0] in ("log", "ln", "exp")
        return len(symbols(node)) > logarithm and len(node.args) > 1 + logarithm
    if node.op in _NAMES:
        return (bool(symbols(node)) or has(node, "apply")) and all(
            _is_name(arg) or arg.op == "rel" or (node.op, arg.op) == ("apply", "group")
            or (node.op in _POINTED and not symbols(arg))
            for arg in node.args if isinstance(arg, Node)
        )  # fmt: skip
    return False


def only_names(node: Node) -> bool:
    """Whether a tree, not one letter, only names a value: a + b, AB/CD, but no x + 1, y' + y."""
    names, terms = symbols(node), node.args if node.op == "add" else (node,)
    several = len(names) > 1 or any(name.isalpha() and name[1:] for name in names)
    several = (several or has(node, "apply")) and not (terms[1:] and "'" in "".join(names))
    return several and all(_is_name(t.args[0] if t.op == "neg" else t) for t in terms)


def value_of(node: Node) -> Node:
    """The value of a ``name = … = value`` relation."""
    first, last = node.args[1], node.args[-1]
    return last if _is_name(first) else first


def is_numbered(name: Node) -> bool:
    """x_1, x_2 name the solutions of one equation: their order means nothing."""
    return name.op == "sym" and "_" in name.args[0]
