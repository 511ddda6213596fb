"""Every agent in `agents/` learns to the end, evaluates, and goes on after a crash as if there had been none."""

import importlib

import pandas as pd
import pytest

from semore_bench.listing import agents
from semore_bench.runs import Run
from tests.test_runs import TOY, agent_step, assert_same, call

SHORT = {"total_env_steps": 240, "eval_every": 160, "eval_episodes": 1}
assert SHORT["total_env_steps"] / TOY["action_repeat"] > 2 * TOY["checkpoint_every"]


@pytest.mark.parametrize("name", agents())
def test_agent_learns_evaluates_and_survives_a_crash(name, tmp_path, trained, monkeypatch):
    module = importlib.import_module(f"agents.{name}")
    settings = dict(SHORT)
    if name in ("clip_sac", "vlm_reward_sac"):
        settings["clip"] = str(trained[0] / "clip")
    if name == "semore_sac":  # with the models of the package it is killed in test_runs.py
        settings["annotator"] = "none"
    call(module, tmp_path / "whole", **settings)
    evaluations = pd.read_csv(tmp_path / "whole" / "eval.csv")
    assert evaluations.env_step.max() >= SHORT["total_env_steps"]
    assert evaluations.env_step.nunique() == 2
    metrics = pd.read_csv(tmp_path / "whole" / "metrics.csv")
    assert "critic_loss" in set(metrics.metric)

    receive = Run.receive

    def crash(run: Run):
        if run.agent_step >= 75:  # learning, fifteen steps after a checkpoint
            raise MemoryError
        return receive(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "receive", crash)
        with pytest.raises(MemoryError):
            call(module, tmp_path / "crashed", **settings)
    assert agent_step(tmp_path / "crashed") == 60
    call(module, tmp_path / "crashed", **settings)
    assert_same(tmp_path / "crashed", tmp_path / "whole")
