"""MaDi-SAC: a masker, trained by the critics alone, dims what does not matter (Grooten et al. 2024, arXiv 2312.15339).

A small network of three convolutions gives every pixel of every frame a weight between 0 and 1, and actor and critics
see the product of the two. Nobody shows it a mask: its gradient is that of the critic loss, half of it from the frames
(shifted, as in DrQ) and half from the same frames with a picture laid over them, as in SVEA; the TD target of both is
computed from clean next frames.

Its diff is to be read against `drq_sac.py`: the masker, and the two views in the critic loss.

Differs from the official code: as in DrQ-v2, no target copy of the encoder, and pixels in [-0.5, 0.5]; the encoder has
four convolutions in place of 11 and a `feature_dim` of 50 in place of 100, the masker a quarter of its filters where
all networks are small (`--preset lite`; with all of them an update takes six times as long); the temperature's learning
rate is that of all else; pictures are made-up textures unless a folder is named (there 1.8 million photographs of
Places), and convolutions begin orthogonal, not delta-orthogonal; for speed, the actor and both critics share one
projection to `feature_dim`, which the critics alone train, and the actor learns from what the critics' step saw. Batch,
random steps and replay are those of all agents here.

Logged: `critic_loss` (squared error, summed over both critics, over both views), `q` (mean value of the clean batch),
`mask` (mean weight of the clean frames' pixels), `actor_loss`, `entropy` (of the policy, in nats) and `temperature`
(the weight of the entropy).
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
from semore_bench.overlays import Overlay
from semore_bench.replay import Batch, Replay
from semore_bench.runs import Run, one_line_errors
from wrappers.errors import UserError


@dataclass
class Args(CommonArgs):
    """MaDi-SAC."""

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
    shift: int = 4
    """largest random shift, in pixels"""
    overlay_images: str | None = None
    """folder of pictures to lay over frames, searched recursively (default: made-up textures)"""
    overlay_limit: int = 2000
    """largest number of pictures to lay over frames, drawn with the seed"""
    alpha: float = 0.5
    """weight of the clean view in the critic loss; the augmented view gets the rest"""
    masker_filters: int | None = None
    """filters of the masker's hidden layers (reference 32, lite 8)"""

    def env_config(self) -> EnvConfig:
        """RGB alone."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=None,
        )

    def resolve(self) -> None:
        super().resolve()
        if self.masker_filters is None:
            self.masker_filters = 32 if self.preset == "reference" else 8
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha must lie in [0, 1], got {self.alpha}")
        self.require_at_least(1, "masker_filters")


# ---- networks ----


class Encoder(nn.Sequential):
    """Four 3x3 convolutions of 32 filters: (B, channels, H, W) -> (B, 32, h, w)."""

    def __init__(self, channels: int, strides: tuple[int, ...], bfloat16: bool = False):
        layers: list[nn.Module] = []
        for stride in strides:
            layers += [nn.Conv2d(channels, 32, 3, stride), nn.ReLU(inplace=True)]
            channels = 32
        super().__init__(*layers)
        self.bfloat16 = bfloat16

    def forward(self, x: Tensor) -> Tensor:
        convolve = super().forward
        # On a CPU in pieces, so that it uses the same memory again and again instead of asking for fresh pages.
        pieces = (x,) if x.is_cuda else x.split(64)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            return torch.cat([convolve(piece) for piece in pieces]).float()


class Masker(nn.Sequential):
    """Weights of pixels, from each frame by itself: rgb (B, 3k, H, W) from 0 to 255 -> from 0 to 1, of that shape."""

    def __init__(self, filters: int, bfloat16: bool = False):
        layers: list[nn.Module] = [nn.Conv2d(3, filters, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(filters, filters, 3, padding=1), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(filters, 1, 3, padding=1))
        self.bfloat16 = bfloat16

    def forward(self, rgb: Tensor) -> Tensor:
        convolve = super().forward
        frames = rgb.unflatten(1, (-1, 3)).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        pieces = (frames,) if rgb.is_cuda else frames.split(64)  # as in Encoder
        with torch.autocast(rgb.device.type, torch.bfloat16, enabled=self.bfloat16):
            weight = torch.cat([convolve(piece / 255) for piece in pieces]).float().sigmoid()
        return weight.unflatten(0, (len(rgb), -1)).expand(-1, -1, 3, -1, -1).flatten(1, 2)


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
        self.project = nn.Sequential(nn.Linear(size, args.feature_dim), nn.LayerNorm(args.feature_dim), nn.Tanh())
        self.critic = Critic(args.feature_dim, action_dim, args.hidden_dim, args.critic_layer_norm)
        self.actor = Actor(args.feature_dim, action_dim, args.hidden_dim)
        self.masker = Masker(args.masker_filters, args.bfloat16)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(np.log(args.init_temperature), dtype=torch.float32))
        self.target_entropy = -float(action_dim)
        self.to(device, memory_format=torch.channels_last)
        self.overlay = Overlay(args.overlay_images, args.image_size, args.overlay_limit, args.seed, device)

        critic = [*self.encoder.parameters(), *self.project.parameters(), *self.critic.parameters()]
        critic += self.masker.parameters()
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

    def encode(self, rgb: Tensor) -> Tensor:
        """(B, 3k, H, W) from 0 to 255 -> z (B, feature_dim)."""
        return self.project(self.encoder(rgb.float().div_(255).sub_(0.5)).permute(0, 2, 3, 1).flatten(1))

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        rgb = stack_channels(self.tensor(observation["rgb"]))
        z = self.encode(rgb * self.masker(rgb))
        return (self.actor.mean(z) if deterministic else self.actor(z)[0]).cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        args = self.args
        batch = replay.sample(args.batch_size)
        loss, z, metrics = self.critic_loss(*self.augment(batch))
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

    def augment(self, batch: Batch) -> tuple[Tensor, ...]:
        size = 2, len(batch.reward), 2
        offset = torch.randint(-self.args.shift, self.args.shift + 1, size, dtype=torch.int32).to(self.device)
        rgb = random_shift(self.tensor(batch.rgb), offset[0])
        next_rgb = random_shift(self.tensor(batch.next_rgb), offset[1])
        tensors = (self.tensor(array) for array in (batch.action, batch.reward, batch.discount))
        return rgb, self.overlay(rgb), next_rgb, *tensors

    def critic_loss(
        self, rgb: Tensor, strong: Tensor, next_rgb: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.encode(next_rgb * self.masker(next_rgb))
            next_action, log_prob = self.actor(next_z)
            next_value = self.target(next_z, next_action).amin(0) - self.log_temperature.exp() * log_prob
            td_target = reward + discount * next_value
        mask = self.masker(rgb)
        z = self.encode(rgb * mask)
        q = self.critic(z, action)
        strong_q = self.critic(self.encode(strong * self.masker(strong)), action)
        loss = self.args.alpha * F.mse_loss(q, td_target.expand_as(q)) * 2  # the sum over both critics
        loss = loss + (1 - self.args.alpha) * F.mse_loss(strong_q, td_target.expand_as(q)) * 2
        return loss, z, {"critic_loss": loss.detach(), "q": q.detach().mean(), "mask": mask.detach().mean()}

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
        agent = Agent(run.action_dim, args, run.device)
        replay = run.make_replay(args.n_step, args.discount)
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:  # while the workers step and render
                run.log(agent.update(replay, number))
            replay.add(run.receive())


if __name__ == "__main__":
    main(tyro.cli(Args))
