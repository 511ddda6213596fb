"""DrQ-v2: deterministic policy gradients from pixels with random shifts (Yarats et al. 2021, arXiv 2107.09645).

DrQ's random shifts, with DDPG and clipped double Q-learning in place of SAC: the policy is deterministic and explores
by noise whose standard deviation falls on a schedule, and the TD target is a 3-step return.

Its diff is to be read against `drq_sac.py`: another policy, another TD target, and no entropy.

Differs from the official code: the shift is by whole pixels (a crop of the padded frame). The official one draws
the same offsets but samples bilinearly, and the rounding of its grid changes values by up to 0.004 grey levels.
Frames, batch size, MLPs and random steps are those of all agents here; the paper repeats actions twice
(--action-repeat 2), learns from batches of 256 (512 for walker), with 1-step returns on walker (--n-step 1), begins
with 2,000 random agent steps and keeps 1,000,000 transitions. Targets do not bootstrap where an episode terminates;
the official code's do.

Logged: `critic_loss` (squared error, summed over both critics), `q` (mean value of the batch), `actor_loss` and `std`
(of the exploration noise).
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


@dataclass
class Args(CommonArgs):
    """DrQ-v2."""

    feature_dim: int = 50
    """dimension of the representation that actor and critics see"""
    learning_rate: float = 1e-4
    """Adam learning rate"""
    std_start: float = 1.0
    """initial standard deviation of the exploration noise"""
    std_end: float = 0.1
    """final standard deviation of the exploration noise"""
    std_steps: int = 100_000
    """agent steps of the linear schedule between them (published: 100,000 for easy tasks, 500,000 medium, 2,000,000
    hard)"""
    noise_clip: float = 0.3
    """clip of the exploration noise on the actions in the losses"""
    discount: float = 0.99
    """discount factor (gamma) per agent step"""
    n_step: int = 3
    """n-step return length: rewards summed before bootstrapping from the target critics"""
    tau: float = 0.01
    """Polyak coefficient (tau) of the target critics"""
    update_every: int = 2
    """agent steps per update"""
    shift: int = 4
    """largest random shift, in pixels"""

    def env_config(self) -> EnvConfig:
        """RGB alone."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=None,
        )

    def resolve(self) -> None:
        super().resolve()
        self.require_at_least(1, "std_steps", "update_every")


# ---- networks ----


class Encoder(nn.Sequential):
    """Four 3x3 convolutions of 32 filters: uint8 (B, channels, H, W) -> (B, 32, h, w)."""

    def __init__(self, channels: int, strides: tuple[int, ...], bfloat16: bool = False):
        layers: list[nn.Module] = []
        for stride in strides:
            layers += [nn.Conv2d(channels, 32, 3, stride), nn.ReLU(inplace=True)]
            channels = 32
        super().__init__(*layers)
        self.bfloat16 = bfloat16

    def forward(self, rgb: Tensor) -> Tensor:
        convolve = super().forward
        # On a CPU in pieces, so that it uses the same memory again and again instead of asking for fresh pages.
        pieces = (rgb,) if rgb.is_cuda else rgb.split(64)
        with torch.autocast(rgb.device.type, torch.bfloat16, enabled=self.bfloat16):
            return torch.cat([convolve((piece / 255).sub_(0.5)) for piece in pieces]).float()


class Critic(nn.Module):
    """Two Q functions: maps (B, map_dim), action (B, A) -> (2, B)."""

    def __init__(self, map_dim: int, feature_dim: int, action_dim: int, hidden_dim: int, layer_norm: bool = False):
        super().__init__()
        self.project = projection(map_dim, feature_dim)
        self.q1 = mlp(feature_dim + action_dim, hidden_dim, 1, layer_norm)
        self.q2 = mlp(feature_dim + action_dim, hidden_dim, 1, layer_norm)

    def forward(self, maps: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([self.project(maps), action], -1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


class Actor(nn.Module):
    """Policy: maps (B, map_dim), standard deviation and clip of the noise -> action (B, A) in (-1, 1)."""

    def __init__(self, map_dim: int, feature_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.project = projection(map_dim, feature_dim)
        self.trunk = mlp(feature_dim, hidden_dim, action_dim)

    def forward(self, maps: Tensor, std: Tensor, clip: float = np.inf) -> Tensor:
        mean = self.mean(maps)
        action = mean + (torch.randn_like(mean) * std).clamp(-clip, clip)
        # cut to the valid range, but let the gradient pass as if it were not
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def mean(self, maps: Tensor) -> Tensor:
        return torch.tanh(self.trunk(self.project(maps)))


def projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Tanh())


def mlp(inputs: int, hidden: int, outputs: int, layer_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (inputs, hidden):
        layers += [nn.Linear(size, hidden), nn.LayerNorm(hidden) if layer_norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.orthogonal_(module.weight, nn.init.calculate_gain("relu") if isinstance(module, nn.Conv2d) else 1.0)
        nn.init.zeros_(module.bias)


# ---- losses ----


def random_shift(frames: Tensor, offset: Tensor) -> Tensor:
    """Shifts each sample by its own offset, repeating the border: the crop of an edge-padded image.

    frames uint8 (B, k, H, W, c), offset int32 (B, 2) -> uint8 (B, k * c, H, W) in channels-last layout.
    """
    batch, stack, height, width, channels = frames.shape
    y = (torch.arange(height, dtype=offset.dtype, device=frames.device) + offset[:, :1]).clamp(0, height - 1)
    x = (torch.arange(width, dtype=offset.dtype, device=frames.device) + offset[:, 1:]).clamp(0, width - 1)
    image = torch.arange(batch * stack, dtype=offset.dtype, device=frames.device).view(batch, 1, 1, stack)
    rows = (image * height + y[:, :, None, None]) * width + x[:, None, :, None]
    shifted = frames.reshape(-1, channels).index_select(0, rows.reshape(-1))
    return shifted.view(batch, height, width, stack * channels).permute(0, 3, 1, 2)


def stack_channels(frames: Tensor) -> Tensor:
    """uint8 (B, k, H, W, c) -> (B, k * c, H, W), as `random_shift` with no offset."""
    return frames.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous(memory_format=torch.channels_last)


# ---- agent ----


class Agent(nn.Module):
    """Acts and learns; `optimizers` and the module's state are what a checkpoint holds."""

    def __init__(self, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        self.encoder = Encoder(3 * args.frame_stack, args.conv_strides, args.bfloat16)
        size = self.encoder(torch.zeros(1, 3 * args.frame_stack, args.image_size, args.image_size)).numel()
        self.critic = Critic(size, args.feature_dim, action_dim, args.hidden_dim, args.critic_layer_norm)
        self.actor = Actor(size, args.feature_dim, action_dim, args.hidden_dim)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("std", torch.tensor(args.std_start))
        self.to(device, memory_format=torch.channels_last)

        critic = [*self.encoder.parameters(), *self.critic.parameters()]
        self.optimizers = {
            "critic": torch.optim.Adam(critic, args.learning_rate, fused=True),
            "actor": torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True),
        }
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def encode(self, rgb: Tensor) -> Tensor:
        """uint8 (B, 3k, H, W) -> maps (B, map_dim), ordered as they lie in memory."""
        return self.encoder(rgb).permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        maps = self.encode(stack_channels(self.tensor(observation["rgb"])))
        return (self.actor.mean(maps) if deterministic else self.actor(maps, self.std)).cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Call `number` (from 0) of learning; returns what to log, as tensors: nothing where no update is due."""
        args = self.args
        self.std.fill_(self.schedule(args.random_steps + number // args.updates_per_step))
        if number % args.update_every:
            return {}
        batch = replay.sample(args.batch_size)
        loss, maps, metrics = self.critic_loss(*self.augment(batch))
        self.optimize("critic", loss)
        loss = self.actor_loss(maps.detach())
        self.optimize("actor", loss)
        for target, online in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            target.data.lerp_(online.data, args.tau)
        return metrics | {"actor_loss": loss.detach(), "std": self.std.clone()}

    def schedule(self, agent_step: int) -> float:
        """Standard deviation of the exploration noise."""
        args = self.args
        return args.std_start + (args.std_end - args.std_start) * min(1.0, agent_step / args.std_steps)

    def augment(self, batch: Batch) -> tuple[Tensor, ...]:
        size = 2, len(batch.reward), 2
        offset = torch.randint(-self.args.shift, self.args.shift + 1, size, dtype=torch.int32).to(self.device)
        rgb = random_shift(self.tensor(batch.rgb), offset[0])
        next_rgb = random_shift(self.tensor(batch.next_rgb), offset[1])
        return rgb, next_rgb, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def critic_loss(
        self, rgb: Tensor, next_rgb: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_maps = self.encode(next_rgb)
            next_action = self.actor(next_maps, self.std, self.args.noise_clip)
            td_target = reward + discount * self.target(next_maps, next_action).amin(0)
        maps = self.encode(rgb)
        q = self.critic(maps, action)
        loss = F.mse_loss(q, td_target.expand_as(q)) * 2  # the sum over both critics
        return loss, maps, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def actor_loss(self, maps: Tensor) -> Tensor:
        action = self.actor(maps, self.std, self.args.noise_clip)
        return -self.critic(maps, action).amin(0).mean()

    def optimize(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()


# ---- main ----


@one_line_errors
def main(args: Args) -> None:
    with Run(args, __file__) as run:
        agent = Agent(run.action_dim, args, run.device)
        replay = run.make_replay(args.n_step, args.discount)
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:  # while the workers step and render
                run.log(agent.update(replay, number))
            replay.add(run.receive())


if __name__ == "__main__":
    main(tyro.cli(Args))
