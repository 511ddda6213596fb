"""The three floors: no file too long to be read, no circle of imports, and nothing imports what lies above it."""

import ast
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
MAX_LINES = 450


def imported(module: str) -> Iterator[str]:
    """Modules of ours that a module imports, also inside functions; what is for type checkers alone does not count."""
    pending: list[ast.AST] = [ast.parse(FILES[module].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide where things lie"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in whole]
        else:
            continue
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
