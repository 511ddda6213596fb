"""SGQN-SAC: saliency-guided critics, which are to look at few pixels (Bertoin et al. 2022, arXiv 2209.09203).

Guided backpropagation says of every pixel how much a critic's value depends on it; the uppermost `1 - quantile` of
each frame are kept. Two losses make use of that: the critics' values shall stay what they are if all other pixels are
painted over in one brightness (consistency), and a small decoder shall predict, from the representation of the frames
with a picture laid over them, which pixels were kept in the clean ones, so that the encoder learns to see them whatever
lies behind. The frames are shifted as in DrQ.

Its diff is to be read against `drq_sac.py`: attribution masks, consistency, and the auxiliary prediction.

Differs from the official code: as in DrQ-v2, no target copy of the encoder, and pixels in [-0.5, 0.5]; the encoder has
four convolutions in place of 11 and a `feature_dim` of 50 in place of 100, the decoder 32 filters in place of 128 and
64 and one map per frame in place of three equal ones; the temperature's learning rate is that of all else; the weight
decay is the paper's, and the quantile 0.95 for all tasks (the paper has 0.98 where the body is small: `--quantile`);
the prediction's goal is the mask that was made for the critics' step, not another one made after it; pictures are
made-up textures unless a folder is named (there 1.8 million photographs of Places), and convolutions begin orthogonal,
not delta-orthogonal; for speed, the actor and both critics share one projection to `feature_dim`, which the actor does
not train, and the actor learns from what the critics' step saw. Batch, random steps and replay are those of all agents
here.

Logged: `critic_loss` (squared error, summed over both critics), `q` (mean value of the batch), `consistency_loss`
(squared difference of values with and without the pixels that were not kept, summed over both critics),
`attribution_loss` (cross entropy of predicted and actual masks), `actor_loss`, `entropy` (of the policy, in nats) and
`temperature` (the weight of the entropy).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
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
    """SGQN-SAC."""

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
    quantile: float = 0.95
    """share of each frame's pixels that are painted over; the paper has 0.95 for large bodies, 0.98 for small ones"""
    consistency_coef: float = 0.5
    """weight of the consistency in the critic loss"""
    weight_decay: float = 1e-5
    """weight decay of the critics' and their encoder's optimizer"""
    attribution_every: int = 2
    """critic updates per update of the attribution's prediction"""
    attribution_learning_rate: float = 3e-4
    """Adam learning rate of the attribution's prediction, encoder included"""

    def env_config(self) -> EnvConfig:
        """RGB alone."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=None,
        )

    def resolve(self) -> None:
        super().resolve()
        if not 0 <= self.quantile <= 1:
            raise UserError(f"--quantile must lie in [0, 1], got {self.quantile}")
        self.require_at_least(1, "attribution_every")


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


class AttributionDecoder(nn.Sequential):
    """Predicts which pixels are kept: z (B, feature_dim) beside action (B, A) -> logits (B, frames, size, size)."""

    def __init__(self, inputs: int, frames: int, size: int):
        quarter = math.ceil(size / 4)
        layers: list[nn.Module] = [
            nn.Linear(inputs, 32 * quarter**2),
            nn.Unflatten(1, (32, quarter, quarter)),
            nn.ReLU(),
        ]
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Upsample(2 * quarter)]
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Upsample(size)]
        super().__init__(*layers, nn.Conv2d(32, frames, 3, padding=1))


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


@contextmanager
def guided(*modules: nn.Module) -> Iterator[None]:
    """Guided backpropagation (Springenberg et al. 2015): these modules' ReLUs let positive gradients alone through.

    It holds for what is computed meanwhile, whenever its gradient is taken.
    """

    def clamp(relu: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(F.relu)

    relus = (part for module in modules for part in module.modules() if isinstance(part, nn.ReLU))
    hooks = [relu.register_forward_hook(clamp) for relu in relus]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def uppermost(saliency: Tensor, quantile: float) -> Tensor:
    """The pixels whose strongest colour is at or above their frame's quantile: (B, 3k, H, W) -> bool (B, k, H, W)."""
    strength = saliency.unflatten(1, (-1, 3)).abs().amax(2)
    pixels = strength.flatten(2)
    rank = math.ceil(quantile * (pixels.shape[-1] - 1)) + 1
    return strength >= pixels.kthvalue(rank).values[..., None, None]


def paint_over(rgb: Tensor, mask: Tensor) -> Tensor:
    """Gives all but the masks' pixels one random brightness: rgb uint8 (B, 3k, H, W), mask bool (B, k, H, W) -> rgb."""
    darkest, brightest = rgb.aminmax()
    paint = torch.lerp(darkest.float(), brightest.float(), torch.rand((), device=rgb.device)).to(rgb.dtype)
    return torch.where(mask.repeat_interleave(3, 1), rgb, paint)


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
        self.decoder = AttributionDecoder(args.feature_dim + action_dim, args.frame_stack, args.image_size)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(np.log(args.init_temperature), dtype=torch.float32))
        self.target_entropy = -float(action_dim)
        self.to(device, memory_format=torch.channels_last)
        self.overlay = Overlay(args.overlay_images, args.image_size, args.overlay_limit, args.seed, device)

        critic = [*self.encoder.parameters(), *self.project.parameters(), *self.critic.parameters()]
        attribution = [*self.encoder.parameters(), *self.project.parameters(), *self.decoder.parameters()]
        self.optimizers = {
            "critic": torch.optim.Adam(critic, args.learning_rate, weight_decay=args.weight_decay, fused=True),
            "actor": torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True),
            "temperature": torch.optim.Adam([self.log_temperature], args.learning_rate),
            "attribution": torch.optim.Adam(attribution, args.attribution_learning_rate, fused=True),
        }
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)
            self.attribution_loss = torch.compile(self.attribution_loss)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def encode(self, rgb: Tensor) -> Tensor:
        """(B, 3k, H, W) from 0 to 255 -> z (B, feature_dim)."""
        return self.project(self.encoder((rgb / 255).sub_(0.5)).permute(0, 2, 3, 1).flatten(1))

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        z = self.encode(stack_channels(self.tensor(observation["rgb"])))
        return (self.actor.mean(z) if deterministic else self.actor(z)[0]).cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        args = self.args
        batch = replay.sample(args.batch_size)
        rgb, next_rgb, action, reward, discount = self.augment(batch)
        mask = uppermost(self.saliency(rgb, action), args.quantile)
        loss, z, metrics = self.critic_loss(rgb, paint_over(rgb, mask), next_rgb, action, reward, discount)
        self.optimize("critic", loss)

        if number % args.actor_every == 0:
            loss, log_prob = self.actor_loss(z.detach())
            self.optimize("actor", loss)
            temperature = self.log_temperature.exp()
            self.optimize("temperature", (temperature * (-log_prob - self.target_entropy).detach()).mean())
            for target, online in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                target.data.lerp_(online.data, args.tau)
            metrics |= {"actor_loss": loss.detach(), "entropy": -log_prob.mean(), "temperature": temperature.detach()}
        if number % args.attribution_every == 0:
            loss = self.attribution_loss(self.overlay(rgb), action, mask)
            self.optimize("attribution", loss)
            metrics["attribution_loss"] = loss.detach()
        return metrics

    def augment(self, batch: Batch) -> tuple[Tensor, ...]:
        size = 2, len(batch.reward), 2
        offset = torch.randint(-self.args.shift, self.args.shift + 1, size, dtype=torch.int32).to(self.device)
        rgb = random_shift(self.tensor(batch.rgb), offset[0])
        next_rgb = random_shift(self.tensor(batch.next_rgb), offset[1])
        return rgb, next_rgb, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def saliency(self, rgb: Tensor, action: Tensor) -> Tensor:
        """How much the first critic's values depend on each pixel: float32 like rgb."""
        pixels = rgb.float().requires_grad_()
        with guided(self.encoder, self.critic):
            value = self.critic(self.encode(pixels), action)[0]
        return torch.autograd.grad(value.sum(), pixels)[0]

    def critic_loss(
        self, rgb: Tensor, painted: Tensor, next_rgb: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.encode(next_rgb)
            next_action, log_prob = self.actor(next_z)
            next_value = self.target(next_z, next_action).amin(0) - self.log_temperature.exp() * log_prob
            td_target = reward + discount * next_value
        z = self.encode(rgb)
        q = self.critic(z, action)
        loss = F.mse_loss(q, td_target.expand_as(q)) * 2  # the sum over both critics
        consistency = F.mse_loss(self.critic(self.encode(painted), action), q) * 2
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "consistency_loss": consistency.detach()}
        return loss + self.args.consistency_coef * consistency, z, metrics

    def attribution_loss(self, strong: Tensor, action: Tensor, mask: Tensor) -> Tensor:
        logits = self.decoder(torch.cat([self.encode(strong), action], -1))
        return F.binary_cross_entropy_with_logits(logits, mask.float())

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
