"""`python -m verl.tools.keys` writes docs/keys.md: every configuration key, from the schema."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config.base import Rules, Section, SFTConfig, shown
from verl.config.load import compose_config
from verl.config.schema import Config
from verl.config.validate import LIMITS
from verl.config.verl_keys import TABLES, WITHOUT_EFFECT

FILE = Path(__file__).parents[2] / "docs" / "keys.md"
VERL_FILE = FILE.with_name("from-verl.md")
WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}
INTRODUCTION = """\
# Configuration keys

`python -m verl.tools.keys` writes this page from `verl/config`.

A command takes `key=value`. `DRY_RUN=1` before it prints the value of every key.
A default of `null` means that the value follows from other keys, or that there is none.

A run that resumes from a checkpoint must have the same keys, unless a key says otherwise here.
Keys that have no effect in a run may always change. They are named in a warning.
"""
ON_RESUME = {
    "free": "May change on resume.",
    "warn": "May change on resume, with a warning.",
    "validation": "May change on resume; validations before and after are then not compared.",
}


def page() -> str:
    """The content of docs/keys.md."""
    parts = [INTRODUCTION]
    for program, name, config in (
        ("main_ppo", "ppo_trainer", Config()),
        ("main_sft", "sft_trainer", SFTConfig()),
    ):
        defaults = OmegaConf.to_container(compose_config((), name))
        rules = {key: rule for key, _, rule in config.walk()}
        if isinstance(config, SFTConfig):  # a warm-up never resumes
            rules = {key: replace(rule, on_resume="") for key, rule in rules.items()}
        entries = "\n".join(_section(config, "", defaults, rules))
        parts.append(f"## Keys of `verl.trainer.{program}`\n\n{entries}")
    return "\n".join(parts) + "\n"


def verl_page(text: str) -> str:
    """The content of docs/from-verl.md: its present `text`, with the lists of keys made anew."""
    lists = [
        ("## Other names", "`{}`: `{}`"),
        ("## Counts of all ranks", "`{}`: a rank's share is `{}`"),
        ("## Without effect", "`{}`: {}"),
        ("## Not supported", "`{}`: {}"),
    ]
    for (title, form), table in zip(lists, TABLES.values(), strict=True):
        before, after = text.split(f"{title}\n")
        introduction, _, old = after.partition("\n- ")
        rest = old.partition("\n## ")[2]
        entries = [textwrap.fill(form.format(*item), 98, **WHOLE_WORDS) for item in table.items()]
        items = "".join(f"\n- {textwrap.indent(e, '  ').strip()}" for e in entries)
        text = f"{before}{title}\n{introduction}{items}\n" + (f"\n## {rest}" if rest else "")
    return text


def _section(
    section: Section, prefix: str, defaults: Any, rules: dict[str, Rules]
) -> Iterator[str]:
    """Lines about the keys of a section, then about those of the sections in it."""
    texts, below = _docstrings(type(section)), []
    if prefix:
        yield f"### `{prefix.removesuffix('.')}`\n"
        about = inspect.cleandoc(type(section).__doc__ or "").partition(": ")[2]
        if about:
            yield _wrapped(about[0].upper() + about[1:]) + "\n"
    for f in fields(section):
        key, value = f"{prefix}{f.name}", getattr(section, f.name)
        if isinstance(value, Section):
            below.append((value, f"{key}.", defaults[f.name]))
        else:
            yield _entry(f.name, inspect.formatannotation(f.type), defaults[f.name], rules[key])
            more = [texts[f.name], _on_resume(rules[key]), _idle(key, rules[key])]
            yield textwrap.indent(_wrapped(" ".join(filter(None, more)), 98), "  ")
    if len(below) < len(fields(section)):
        yield ""
    for child, name, values in below:
        yield from _section(child, name, values, rules)


def _entry(name: str, kind: str, default: Any, rules: Rules) -> str:
    """The line with a key's type, default and bounds."""
    follows = isinstance(default, str) and default.startswith("${")
    facts = [
        "float, or `auto`" if rules.auto else kind.replace("typing.", "").replace("Any", "any"),
        f"default `{'null' if follows else shown(default)}`",
    ]
    if rules.choices:
        own = ", or `path/to/file.py:function`" if rules.own else ""
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in rules.choices) + own)
    for limit, (_, words) in LIMITS.items():
        if (bound := getattr(rules, limit)) is not None:
            facts.append(f"{words} {bound}")
    return textwrap.fill(
        f"- **`{name}`**: {'; '.join(facts)}.",
        100,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _on_resume(rules: Rules) -> str:
    kind, _, condition = rules.on_resume.partition(" unless ")
    text = ON_RESUME.get(kind, "")
    return f"{text[:-1]}, except with `{condition}`." if condition else text


def _idle(key: str, rules: Rules) -> str:
    if reason := WITHOUT_EFFECT.get(key):
        return f"No effect: {reason}."
    conditions = " or ".join(f"`{condition}`" for condition in rules.idle_if)
    return f"No effect with {conditions.replace(' and ', '` and `')}." if conditions else ""


def _wrapped(text: str, width: int = 100) -> str:
    return textwrap.fill(text, width, **WHOLE_WORDS)


def _docstrings(section: type[Section]) -> dict[str, str]:
    """Key → the text below it in the source."""
    found = {}
    for cls in reversed(section.__mro__[: section.__mro__.index(Section)]):
        (tree,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(tree, ast.ClassDef)
        for node, following in itertools.pairwise(tree.body):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = ast.literal_eval(following.value)
                found[ast.unparse(node.target)] = " ".join(text.split())
    return found


def main() -> None:
    """Writes the pages."""
    FILE.write_text(page())
    VERL_FILE.write_text(verl_page(VERL_FILE.read_text()))
    print(FILE, VERL_FILE)


if __name__ == "__main__":
    main()
