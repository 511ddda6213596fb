"""What must hold on a GPU; without one, in a tiny form on the CPU, so that these tests are known to work."""

import copy

import numpy as np
import pytest
import torch

from agents import drq_sac
from semore_bench.replay import Batch
from semore_bench.runs import Run
from tests.toy_runs import agent_step, call

pytestmark = pytest.mark.gpu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZE, BATCH = (84, 256) if CUDA else (36, 4)


class FixedReplay:
    """Always draws the same transitions."""

    def __init__(self):
        random = np.random.default_rng(0)
        frames = random.integers(0, 256, (2, BATCH, 3, SIZE, SIZE, 3), np.uint8)
        action = random.uniform(-1, 1, (BATCH, 2)).astype(np.float32)
        reward = random.uniform(0, 1, BATCH).astype(np.float32)
        self.batch = Batch(*frames, None, None, action, reward, np.full(BATCH, 0.99, np.float32))

    def sample(self, batch_size: int) -> Batch:
        return self.batch


def make(device: str, **settings) -> drq_sac.Agent:
    args = drq_sac.Args(image_size=SIZE, batch_size=BATCH, device=device, **settings)
    args.resolve()
    torch.manual_seed(0)
    return drq_sac.Agent(2, args, torch.device(device))


def measured(agent: drq_sac.Agent) -> dict[str, np.ndarray]:
    """What does not depend on random numbers of the device: values before an update, and actions after it."""
    replay = FixedReplay()
    torch.manual_seed(1)
    value = agent.update(replay, 0)["q"]
    actions = agent.act({"rgb": replay.batch.rgb}, deterministic=True)
    return {"q": value.detach().float().cpu().numpy(), "actions": actions}


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 5e-3), ({"bfloat16": True}, 5e-2), ({"compile": True}, 5e-3)],
    ids=["plain", "bfloat16", "compile"],
)
def test_numbers_are_those_of_the_cpu(settings, tolerance):
    if "compile" in settings and not CUDA:
        pytest.skip("compiling for the CPU takes minutes")
    agent = make(DEVICE, **settings)
    reference = make("cpu")
    reference.load_state_dict(copy.deepcopy(agent.state_dict()))
    got, want = measured(agent), measured(reference)
    for name in want:
        assert np.allclose(got[name], want[name], atol=tolerance), name


def test_killed_and_continued(tmp_path, monkeypatch):
    """It goes on from the same weights and random states; after that a GPU's sums may come in another order."""
    monkeypatch.setattr("semore_bench.runs.CHECKPOINT_SECONDS", np.inf)  # a slow machine saves at the same steps
    settings = {"device": DEVICE, "total_env_steps": 200, "eval_episodes": 1}
    receive = Run.receive

    def crash(run: Run):
        if run.agent_step >= 75:
            raise MemoryError
        return receive(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "receive", crash)
        with pytest.raises(MemoryError):
            call(drq_sac, tmp_path / "run", **settings)
    assert agent_step(tmp_path / "run") == 60
    call(drq_sac, tmp_path / "run", **settings)
    call(drq_sac, tmp_path / "whole", **settings)
    runs = [
        torch.load(max((tmp_path / name / "checkpoint").glob("*.pt")), weights_only=True) for name in ("run", "whole")
    ]
    assert runs[0]["counters"] == runs[1]["counters"]
    for name, weight in runs[0]["agent"].items():
        assert torch.allclose(weight, runs[1]["agent"][name], atol=1e-2 if CUDA else 0), name
