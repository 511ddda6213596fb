"""Pages that are generated are current, links lead somewhere, and what a visitor is told to type exists."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from semore_bench import cli, pages

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def test_generated_pages_are_current():
    found = {path.name: path.read_text("utf-8") for path in (ROOT / "docs/agents").glob("*.md")}
    assert found == pages.pages(), "type: make docs"


def test_the_table_of_the_readme_is_current():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text == pages.readme(text), "type: make docs"


def anchors(page: Path) -> set[str]:
    """Names that links may add to a page: its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_told_exist(page):
    text = page.read_text("utf-8")
    for command in re.findall(r"(?:^|`|bin/)semore-bench ([a-z][\w-]*)", text, re.M):
        assert command in cli.COMMANDS, command
    for agent in re.findall(r"python (agents/\w+\.py)", text):
        assert (ROOT / agent).exists(), agent
    makefile = (ROOT / "Makefile").read_text()
    for targets in re.findall(r"^(?:sudo )?make ((?:[a-z-]+ )*[a-z-]+)(?=\s*#|$)", text, re.M):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_setup_leaves_the_system_alone():
    typed = subprocess.run(
        ["make", "-n", "setup", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert typed.returncode == 0, typed.stderr
    assert "pip install" in typed.stdout or (ROOT / ".venv/installed").exists()
    assert "apt-get" not in typed.stdout


def test_what_a_repository_says_of_itself_agrees():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    steps = re.findall(r"run: (?:sudo )?make (\w+)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert steps == ["system", "lint", "test"]
    assert "make system lint test" in (ROOT / ".ci/run").read_text()
