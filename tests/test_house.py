"""The three floors: no file too long to be read, no circle of imports, and nothing imports what lies above it.

Tests import nothing from each other."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("wrappers", "semore_bench", "agents")  # from the bottom
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for floor in FLOORS
    for file in sorted((ROOT / floor).rglob("*.py"))
}
TESTS = {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "tests").rglob("*.py"))}
TEST_FILE = re.compile(r"(tests\.(\w+\.)*)?test_")
MAX_LINES = 450


def named(node: ast.AST) -> list[str]:
    """What a statement imports, or takes from what it imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imported(module: str) -> Iterator[str]:
    """Modules of ours that a module imports, also inside functions; what is for type checkers alone does not count."""
    pending: list[ast.AST] = [ast.parse(FILES[module].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        assert not getattr(node, "level", 0), f"{module}: relative imports hide where things lie"
        names = [name if name in FILES else name.rpartition(".")[0] for name in named(node)]
        yield from (name for name in names if name in FILES and name != module)


def test_no_import_leads_in_a_circle():
    """Whatever is imported inside a function counts too: a circle that is only put off is one all the same."""
    graph = {module: set(imported(module)) for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports lead in a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_what_lies_above(module):
    """Wrappers know nothing of the harness, the harness nothing of agents, and agents nothing of each other."""
    floor = FLOORS.index(module.partition(".")[0])
    allowed = FLOORS[: floor + 1] if floor < 2 else FLOORS[:2]
    assert not [name for name in imported(module) if name.partition(".")[0] not in allowed]


@pytest.mark.parametrize("module", FILES)
def test_files_can_be_read_in_one_go(module):
    """Beyond that a file has more than one subject."""
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{FILES[module].relative_to(ROOT)} has {lines} lines: cut it by subject"


def imported_tests(source: str) -> list[str]:
    """Test files that a file imports or takes something from, also inside functions."""
    return [name for node in ast.walk(ast.parse(source)) for name in named(node) if TEST_FILE.match(name)]


@pytest.mark.parametrize("file", TESTS)
def test_nothing_is_imported_from_a_test_file(file):
    """What several of them use lies in a helper module, so that each can be read, changed and run alone."""
    assert not imported_tests(TESTS[file].read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import tests.test_runs as runs",
        "from tests.test_runs import call",
        "from tests.faults.test_killed_runs import run",
        "from tests import fakes, test_runs",
        "from test_runs import call",
        "def call():\n    from tests.test_runs import call",
    ],
)
def test_an_import_from_a_test_file_is_found_however_it_is_written(source):
    assert len(imported_tests(source)) == 1
    assert not imported_tests(source.replace("test_", "toy_"))
