"""Every agent in `agents/` learns to the end, evaluates, and goes on after a crash as if there had been none."""

import importlib

import numpy as np
import pandas as pd
import pytest
import torch

from semore_bench.listing import agent_files
from semore_bench.runs import Run
from semore_bench.trained import find_trained, load_trained
from tests.toy_runs import TOY, agent_step, assert_same, call, equal
from wrappers.errors import UserError

DISCRETE = "tests.toy_env:ToyDiscrete-v0"
SHORT = {"total_env_steps": 120, "eval_every": 100, "eval_episodes": 1, "random_steps": 10, "checkpoint_every": 20}
assert SHORT["total_env_steps"] / TOY["action_repeat"] > 2 * SHORT["checkpoint_every"]


@pytest.mark.parametrize("name", agent_files())
def test_agent_learns_evaluates_and_survives_a_crash(name, tmp_path, request, monkeypatch):
    module = importlib.import_module(f"agents.{name}")
    settings = dict(SHORT)
    if name in ("clip_sac", "vlm_reward_sac"):
        settings["clip"] = str(request.getfixturevalue("trained")[0] / "clip")
    if name in ("madi_sac", "sgqn_sac"):
        settings["overlay_limit"] = 8
    if name in ("semore_sac", "state_sac"):
        settings["env_id"] = "InvertedPendulum-v5"
    if name.endswith("_dqn"):
        settings["env_id"] = "tests.toy_env:DiscretePendulum-v0" if name == "semore_dqn" else DISCRETE
    if name.startswith("semore_"):  # with the embedded models it is killed in test_runs.py
        settings |= {"annotator": "simulator", "annotation_grid": 8, "annotate_every": 2, "grounder_frames": 4}
        # The grounder learns before the checkpoint (agent steps 10, 14), between it and the crash (22), and after (38).
        settings |= {"grounder_updates": 4, "grounder_batch": 4, "ground_every": 4}
    if name == "semore_dqn":
        settings |= {"grounder_pasting": True, "overlay_limit": 8}
    if settings.get("env_id", DISCRETE) == DISCRETE:
        monkeypatch.setattr("semore_bench.workers.START_METHOD", "fork")  # nothing is rendered, and much is loaded here
    call(module, tmp_path / "whole", **settings)
    evaluations = pd.read_csv(tmp_path / "whole" / "eval.csv")
    assert evaluations.env_step.max() >= SHORT["total_env_steps"]
    assert evaluations.env_step.nunique() == 2
    metrics = pd.read_csv(tmp_path / "whole" / "metrics.csv")
    assert "critic_loss" in set(metrics[metrics.env_step >= SHORT["total_env_steps"]].metric), "none is lost"
    assert ("grounder_loss" in set(metrics.metric)) == name.startswith("semore_")

    # On a slow machine a checkpoint that is due after some minutes would come in between.
    monkeypatch.setattr("semore_bench.runs.CHECKPOINT_SECONDS", np.inf)
    receive = Run.receive

    def crash(run: Run):
        if run.agent_step >= 27:  # learning, seven steps after a checkpoint
            raise MemoryError
        return receive(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "receive", crash)
        with pytest.raises(MemoryError):
            call(module, tmp_path / "crashed", **settings)
    assert agent_step(tmp_path / "crashed") == 20
    call(module, tmp_path / "crashed", **settings)
    assert_same(tmp_path / "crashed", tmp_path / "whole")
    trained = load_trained(find_trained(tmp_path / "whole"), device="cpu")
    newest = max((tmp_path / "whole" / "checkpoint").glob("*.pt"))
    assert equal(dict(trained.agent.state_dict()), dict(torch.load(newest, weights_only=True)["agent"]))


@pytest.mark.parametrize("name", agent_files())
def test_an_annotator_that_nobody_would_listen_to_is_refused(name):
    module = importlib.import_module(f"agents.{name}")
    args = module.Args(annotator="simulator")
    if name.startswith("semore_"):
        args.resolve()
        assert args.env_config().annotator == "simulator"
        module.Args(semantic=False, motion=False).resolve()  # its own default is nobody's mistake
        return
    with pytest.raises(UserError, match="uses no annotations: leave --annotator simulator out"):
        args.resolve()


@pytest.mark.parametrize(
    "name", [name for name in agent_files() if hasattr(importlib.import_module(f"agents.{name}"), "Encoder")]
)
def test_convolutions_in_bfloat16_give_nearly_the_same(name):
    module = importlib.import_module(f"agents.{name}")
    torch.manual_seed(0)
    exact, rough = module.Encoder(9, (2, 2, 1, 1)), module.Encoder(9, (2, 2, 1, 1), bfloat16=True)
    exact.apply(module.orthogonal)
    rough.load_state_dict(exact.state_dict())
    frames = torch.randint(0, 256, (70, 9, 40, 40), dtype=torch.uint8)  # in more than one piece
    maps = [encoder(frames if name == "drqv2" else frames / 255 - 0.5) for encoder in (exact, rough)]
    for values in maps:
        values.square().mean().backward()
    gradients = [torch.cat([weight.grad.flatten() for weight in encoder.parameters()]) for encoder in (exact, rough)]
    for values, others in (maps, gradients):
        assert values.dtype == others.dtype == torch.float32
        assert not torch.equal(values, others)
        assert (values - others).norm() < 0.02 * values.norm()
