"""Agents are read by diff: what they repeat is equal, and what is equal is said in the same words."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

AGENTS = {file.stem: file for file in sorted((Path(__file__).parents[1] / "agents").glob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in AGENTS.items()}

VARIANTS = {
    "Critic": [{"drqv2"}, {"drq_dqn", "semore_dqn"}],  # sees maps, and projects them itself; a value per action
    "Actor": [{"drqv2"}],  # deterministic
    "Encoder": [{"drqv2"}],  # scales its input
    "orthogonal": [{"clip_sac", "state_sac"}, {"sac_ae"}],  # without convolutions; transposed ones too
    "random_shift": [{"clip_sac"}],  # features of patches, not bytes
    "stack_channels": [{"sac_ae", "sac_pixel"}],  # there is no random_shift that it could be like
    "tensor": [],
    "actor_loss": [{"drqv2"}],
    "optimize": [{"sac_ae"}, {"drq_dqn", "semore_dqn"}],  # two optimizers share the encoder; gradients are clipped
    "polyak_update": [],
}
"""functions, classes and methods that agents repeat: sets of agents that have another one than all others"""
OTHER_HELP = {
    ("clip_sac", "shift"),
    ("semore_sac", "feature_dim"),
    ("semore_dqn", "feature_dim"),
    ("semore_sac", "annotator"),
    ("semore_sac", "annotate_every"),
}
"""flags that mean something else in an agent than in the others"""


def repeated(tree: ast.Module) -> dict[str, str]:
    """Syntax trees of what an agent defines, by name: of the file, and the methods of its Agent."""
    agent = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Agent")
    parts = [node for node in [*tree.body, *agent.body] if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.dump(node) for node in parts}


def flags(tree: ast.Module) -> dict[str, str]:
    """Help texts of an agent's own flags."""
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {
        field.target.id: text.value.value
        for field, text in zip(args.body, args.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_what_agents_repeat_is_equal(name):
    agents = defaultdict(set)
    for agent, tree in TREES.items():
        if (dump := repeated(tree).get(name)) is not None:
            agents[dump].add(agent)
    assert agents, f"no agent has a {name} any more"
    found = sorted(agents.values(), key=len)
    usual = found.pop()
    assert sorted(map(sorted, found)) == sorted(map(sorted, VARIANTS[name])), f"the others are {sorted(usual)}"


def test_equal_flags_have_equal_help():
    texts = defaultdict(lambda: defaultdict(set))
    for agent, tree in TREES.items():
        for flag, text in flags(tree).items():
            if (agent, flag) not in OTHER_HELP:
                texts[flag][" ".join(text.split())].add(agent)
    assert {flag: dict(said) for flag, said in texts.items() if len(said) > 1} == {}
    assert len(texts["tau"]) == 1, "flags were found at all"


@pytest.mark.parametrize("agent", AGENTS)
def test_each_agent_names_the_file_that_its_diff_is_to_be_read_against(agent):
    named = re.findall(r"Its\s+diff\s+is\s+to\s+be\s+read\s+against\s+`(\w+)\.py`", ast.get_docstring(TREES[agent]))
    assert len(named) == 1
    assert named[0] in AGENTS.keys() - {agent}
