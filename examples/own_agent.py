"""An agent of your own: a file with `Args(CommonArgs)`, an agent that acts and updates, and a loop.

Everything else comes with it: workers, replay, evaluation, logs, films, exact continuation, and its place in sweeps and
tables: `semore-bench sweep SUITE --agents drq_sac examples/own_agent.py`. This one learns little: it regresses its
policy on the better half of what was tried, seen through mean colours. Begin yours with a copy of `agents/drq_sac.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.replay import Replay
from semore_bench.runs import Run, one_line_errors


@dataclass
class Args(CommonArgs):
    """The better half."""

    learning_rate: float = 1e-3
    """of Adam"""
    n_step: int = 5
    """rewards that are compared"""
    noise: float = 0.3
    """standard deviation of what is added to actions in training"""

    def env_config(self) -> EnvConfig:
        """What is observed: RGB alone; with flow="dis" and **self.guidance, flow and captions too."""
        return EnvConfig(image_size=self.image_size, action_repeat=self.action_repeat, flow=None)


class Agent(nn.Module):
    """`optimizers` and the module's state are what a checkpoint holds."""

    def __init__(self, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        self.policy = nn.Sequential(
            nn.Linear(9 * 9 * 3 * args.frame_stack, 64), nn.ReLU(), nn.Linear(64, action_dim), nn.Tanh()
        )
        self.to(device)
        self.optimizers = {"policy": torch.optim.Adam(self.policy.parameters(), args.learning_rate)}

    def see(self, rgb: np.ndarray) -> Tensor:
        """uint8 (B, k, H, W, 3) -> mean colours of nine by nine patches, (B, k * 9 * 9 * 3)."""
        frames = torch.from_numpy(rgb).to(self.device).flatten(0, 1).permute(0, 3, 1, 2).float() / 255 - 0.5
        return nn.functional.adaptive_avg_pool2d(frames, 9).reshape(len(rgb), -1)

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A) in [-1, 1]."""
        action = self.policy(self.see(observation["rgb"]))
        if not deterministic:
            action = (action + self.args.noise * torch.randn_like(action)).clamp(-1, 1)
        return action.cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """One update; returns what to log, as tensors."""
        batch = replay.sample(self.args.batch_size)
        better = batch.reward >= np.median(batch.reward)
        target = torch.from_numpy(batch.action[better]).to(self.device)
        loss = nn.functional.mse_loss(self.policy(self.see(batch.rgb[better])), target)
        self.optimizers["policy"].zero_grad()
        loss.backward()
        self.optimizers["policy"].step()
        return {"policy_loss": loss.detach()}


@one_line_errors
def main(args: Args) -> None:
    with Run(args, __file__) as run:
        agent = Agent(run.action_dim, args, run.device)
        replay = run.make_replay(args.n_step)
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:
                run.log(agent.update(replay, number))
            replay.add(run.receive())


if __name__ == "__main__":
    main(tyro.cli(Args))
