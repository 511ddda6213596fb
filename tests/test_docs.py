"""Pages that are generated are current, links lead somewhere, and what a visitor is told to type exists."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from semore_bench import cli, estimates, pages
from semore_bench.names import PUBLISHED
from semore_bench.results import results
from tests.synthetic_runs import REACHER, WALKER, write_run, write_suite, write_timed_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def test_generated_pages_are_current():
    found = {path.name: path.read_text("utf-8") for path in (ROOT / "docs/agents").glob("*.md")}
    assert found == pages.pages(), "type: make docs"


def test_the_table_of_the_readme_is_current():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text == pages.readme(text), "type: make docs"


def test_the_readme_compares_who_was_run_on_all_tasks_and_names_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "REPETITIONS", 100)  # no digit of an interval is compared here
    runs = write_timed_sweep(tmp_path / "tiny")
    write_run(runs, WALKER, "curl_sac", 1, {2000: [1000.0]})
    write_run(runs, WALKER, "semore_sac_variant", 1, {2000: [500.0]})
    (tmp_path / "published.csv").write_text(
        "agent,task,seed,env_step,episode_return\n"
        + "".join(f"dreamer,{task},1,2000,600\n" for task in (WALKER, REACHER))
    )
    folder = tmp_path / "results" / "tiny"
    suite = write_suite(tmp_path / "tiny.toml", WALKER, REACHER)
    results("build", (runs,), suite, "drq_sac", folder, tmp_path / "published.csv")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    text = pages.results_table()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    columns, rows = table[0], {row[0]: row for row in table[2:]}
    assert len({len(row) for row in table}) == 1
    assert list(rows) == [
        f"`dreamer{PUBLISHED}`",
        "[`semore_sac`](docs/agents/semore_sac.md)",
        "[`drq_sac`](docs/agents/drq_sac.md)",
    ]
    published, semore, drq = (dict(zip(columns, row, strict=True)) for row in rows.values())
    assert (published["method"], published["seconds per run"]) == ("published by others", "–")
    assert (semore["method"], semore["seeds"], semore["seconds per run"]) == ("Semore-SAC", "3", "42")
    assert semore["P(better than drq_sac) [95%]"] == "1.00 [1.00, 1.00]"
    assert (semore["time to drq_sac's IQM"], drq["time to drq_sac's IQM"]) == ("0.21", "–")
    assert "On some of its 2 tasks: [`curl_sac`](docs/agents/curl_sac.md) (1), `semore_sac_variant` (1)." in text


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
