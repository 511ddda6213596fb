"""State-SAC: soft actor-critic on the simulator's state instead of pixels (Haarnoja et al. 2018, arXiv 1812.05905).

The ceiling: the same actor, critics, representation size and settings as the agents that see pixels, without the
problem of seeing. An agent from pixels that comes close has little left to gain from a better encoder.

Its diff is to be read against `drq_sac.py`: encoder and random shift are gone. Needs an environment that observes its
state: dm_control, Meta-World and MuJoCo do.

Logged: as `drq_sac.py`.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.replay import Batch, Replay
from semore_bench.runs import Run, one_line_errors
from wrappers.errors import UserError


@dataclass
class Args(CommonArgs):
    """State-SAC."""

    feature_dim: int = 50
    """dimension of the representation that actor and critics see"""
    learning_rate: float = 1e-3
    """Adam learning rate"""
    init_temperature: float = 0.1
    """initial entropy temperature (alpha), tuned towards a target entropy of minus the action dimension"""
    discount: float = 0.99
    """discount factor (gamma) per agent step"""
    n_step: int = 1
    """n-step return length: rewards summed before bootstrapping from the target critics"""
    tau: float = 0.01
    """Polyak coefficient (tau) of the target critics"""
    actor_every: int = 2
    """critic updates per update of actor, temperature and target networks"""

    def env_config(self) -> EnvConfig:
        """The state alone: nothing is rendered."""
        return EnvConfig(action_repeat=self.action_repeat, flow=None, state=True)

    def resolve(self) -> None:
        super().resolve()
        if self.capture_video:
            raise UserError("state_sac sees no frames, so there is nothing to film; leave --capture-video out")


# ---- networks ----


class Critic(nn.Module):
    """Two Q functions: z (B, feature_dim), action (B, A) -> (2, B)."""

    def __init__(self, feature_dim: int, action_dim: int, hidden_dim: int, layer_norm: bool = False):
        super().__init__()
        self.q1 = mlp(feature_dim + action_dim, hidden_dim, 1, layer_norm)
        self.q2 = mlp(feature_dim + action_dim, hidden_dim, 1, layer_norm)

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([z, action], -1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


class Actor(nn.Module):
    """Squashed Gaussian policy: z -> action (B, A) in (-1, 1) and its log-probability (B,)."""

    def __init__(self, feature_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.trunk = mlp(feature_dim, hidden_dim, 2 * action_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.trunk(z).chunk(2, -1)
        log_std = -10 + 6 * (torch.tanh(log_std) + 1)  # between -10 and 2
        noise = torch.randn_like(mean)
        raw = mean + noise * log_std.exp()
        log_prob = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
        # log(1 - tanh(x)^2), in a form that stays finite
        log_prob = log_prob - 2 * (np.log(2) - raw - F.softplus(-2 * raw))
        return torch.tanh(raw), log_prob.sum(-1)

    def mean(self, z: Tensor) -> Tensor:
        return torch.tanh(self.trunk(z).chunk(2, -1)[0])


def mlp(inputs: int, hidden: int, outputs: int, layer_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (inputs, hidden):
        layers += [nn.Linear(size, hidden), nn.LayerNorm(hidden) if layer_norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)


# ---- agent ----


class Agent(nn.Module):
    """Acts and learns; `optimizers` and the module's state are what a checkpoint holds."""

    def __init__(self, state_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        self.project = nn.Sequential(nn.Linear(state_dim, args.feature_dim), nn.LayerNorm(args.feature_dim), nn.Tanh())
        self.critic = Critic(args.feature_dim, action_dim, args.hidden_dim, args.critic_layer_norm)
        self.actor = Actor(args.feature_dim, action_dim, args.hidden_dim)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(np.log(args.init_temperature), dtype=torch.float32))
        self.target_entropy = -float(action_dim)
        self.to(device)

        critic = [*self.project.parameters(), *self.critic.parameters()]
        self.optimizers = {
            "critic": torch.optim.Adam(critic, args.learning_rate, fused=True),
            "actor": torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True),
            "temperature": torch.optim.Adam([self.log_temperature], args.learning_rate),
        }
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        z = self.project(self.tensor(observation["features"])[:, -1])
        return (self.actor.mean(z) if deterministic else self.actor(z)[0]).cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        args = self.args
        batch = replay.sample(args.batch_size)
        loss, z, metrics = self.critic_loss(*self.tensors(batch))
        self.optimize("critic", loss)

        if number % args.actor_every == 0:
            loss, log_prob = self.actor_loss(z.detach())
            self.optimize("actor", loss)
            temperature = self.log_temperature.exp()
            self.optimize("temperature", (temperature * (-log_prob - self.target_entropy).detach()).mean())
            for target, online in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                target.data.lerp_(online.data, args.tau)
            metrics |= {"actor_loss": loss.detach(), "entropy": -log_prob.mean(), "temperature": temperature.detach()}
        return metrics

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        state, next_state = (self.tensor(states)[:, -1] for states in (batch.features, batch.next_features))
        return state, next_state, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def critic_loss(
        self, state: Tensor, next_state: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.project(next_state)
            next_action, log_prob = self.actor(next_z)
            next_value = self.target(next_z, next_action).amin(0) - self.log_temperature.exp() * log_prob
            td_target = reward + discount * next_value
        z = self.project(state)
        q = self.critic(z, action)
        loss = F.mse_loss(q, td_target.expand_as(q)) * 2  # the sum over both critics
        return loss, z, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def actor_loss(self, z: Tensor) -> tuple[Tensor, Tensor]:
        action, log_prob = self.actor(z)
        value = self.critic(z, action).amin(0)
        return (self.log_temperature.exp().detach() * log_prob - value).mean(), log_prob.detach()

    def optimize(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()


# ---- main ----


@one_line_errors
def main(args: Args) -> None:
    with Run(args, __file__) as run:
        agent = Agent(run.observation_space["state"].shape[0], run.action_dim, args, run.device)
        replay = run.make_replay(args.n_step, args.discount)
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:  # while the workers step and render
                run.log(agent.update(replay, number))
            replay.add(run.receive())


if __name__ == "__main__":
    main(tyro.cli(Args))
