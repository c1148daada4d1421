"""The documentation is true where a program can tell: links, widths, and the example of a task."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks.aggregation_study.comparison import arguments_of
from tests.helpers import warm_children, warm_python
from verl.config.load import load_config
from verl.trainer.ppo.workers import loss_config
from verl.utils import own_functions

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
PAGES += [REPO / "plugins/README.md"]


def names(page: Path) -> str:
    """A test's name for a page."""
    return str(page.relative_to(REPO))


def without_code(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links may name after the #, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *sorted(REPO.glob("benchmarks/*.md"))], ids=names)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_lines_have_at_most_100_columns(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > 100] == []


def test_the_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 150


def test_the_map_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (REPO / "docs/index.md").read_text()))
    assert {page.name for page in (REPO / "docs").glob("*.md")} - {"index.md"} <= linked


def test_the_functions_of_your_own_pass_their_checks(tmp_path: Path) -> None:
    """The block of docs/your_own_method.md, and the keys that name it there."""
    text = (REPO / "docs" / "your_own_method.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert all(part.count("\n") < 10 for part in code.split("\n\n\n"))
    (tmp_path / "mine.py").write_text(code)
    keys = [key.replace("=", f"={tmp_path}/") for key in re.findall(r"`([\w.]+=mine.*?)`", text)]
    assert len(keys) == 3
    config = load_config(keys)
    own_functions.check(config, loss_config(config))
    command = re.search(r"--methods \\\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    methods = shlex.split(command[1].replace("\\\n", " ")) if command else []
    assert len([arguments_of(words) for words in methods]) == 5


def test_the_task_of_your_own_runs(tmp_path: Path) -> None:
    """The blocks of docs/your-own-task.md, as they stand there, for two steps."""
    text = (REPO / "docs" / "your-own-task.md").read_text()
    for block in re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```$", text, re.DOTALL | re.MULTILINE):
        (tmp_path / block[1]).write_text(block[0])
    (tmp_path / "examples").symlink_to(REPO / "examples")
    commands = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    script = commands.replace(".venv/bin/python", warm_python()).rstrip()
    script += " trainer.total_training_steps=2 trainer.n_gpus_per_node=1"
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
        **warm_children(),
    }
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "validation at step 2" in done.stdout
    assert (tmp_path / "outputs" / "largest" / "huggingface" / "model.safetensors").exists()
