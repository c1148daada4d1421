"""The words and signs that answers are made of, in normalised spelling."""


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


FUNCTIONS = word_set(
    "sin cos tan cot sec csc sinh cosh tanh coth sech csch arcsin arccos arctan arccot arcsec "
    "arccsc arsinh arcosh artanh asin acos atan arcsinh arccosh arctanh ln log lg exp "
    "sqrt cbrt abs Abs factorial binomial max min gcd lcm Re Im arg"
)
GREEK = word_set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
NAMES = GREEK | word_set("ell hbar prime angle triangle square star circ det dim")
ACCENTS = frozenset(
    map("\\{}".format, word_set("vec hat bar overline tilde ddot overrightarrow widehat dot"))
)
SYMBOLS = {r"\infty": "oo", r"\pi": "pi", r"\imath": "i", r"\emptyset": "{}", r"\varnothing": "{}"}
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\lt": "<", r"\gt": ">", r"\le": "<=", r"\ge": ">=",
              r"\ne": "!=", r"\in": "in", r"\notin": "notin", r"\approx": "~", r"\equiv": "==",
              r"\simeq": "~"}  # fmt: skip
SET_OPERATIONS = {r"\cup": "cup", r"\cap": "cap", r"\setminus": "minus", r"\backslash": "minus"}
TIMES = frozenset(["*", r"\cdot", r"\times", r"\ast", r"\div", "/"])
CLOSERS = {"(": ")]", "[": "])[", "]": "[])", r"\{": (r"\}",), "{": "}", r"\langle": (r"\rangle",),
            r"\lfloor": (r"\rfloor",), r"\lceil": (r"\rceil",), r"\lvert": (r"\rvert",),
            r"\|": (r"\|",), "|": "|"}  # fmt: skip
NOT_A_FACTOR = word_set(
    r"\cup \cap \setminus \backslash \pm \mp \} \\ \rangle \rfloor \rceil \rvert \mid \end \| "
    r"\to \lor \land \rightarrow \Rightarrow \implies \iff \subset \subseteq \ldots \dots \cdots "
    r"\sum \prod \int \iint \oint \lim \partial \sim \pmod \bmod \mod \perp \parallel \forall "
    r"\exists"
) | frozenset(RELATIONS) | (TIMES)  # fmt: skip
