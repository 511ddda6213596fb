"""SAC-AE: soft actor-critic with a deterministic autoencoder (Yarats et al. 2021, arXiv 1910.01741).

Beside the critics' loss, the encoder learns to reconstruct the frames. A small L2 penalty on the representation and
weight decay on the decoder regularise it, in place of a variational autoencoder's noise; frames are not augmented.

Its diff is to be read against `sac_pixel.py`: decoder and reconstruction loss.

As in the official code, the reconstruction aims at frames of 5 bits in [-0.5, 0.5] to which uniform noise of one
quantisation step is added (dequantisation, as in Glow, arXiv 1807.03039), and a second Adam updates the encoder.
Differs from it: as in DrQ-v2, convolutions begin orthogonal, not delta-orthogonal, and pixels are in [-0.5, 0.5]; for
speed, the actor and both critics share one projection to `feature_dim`, which the critics alone train, and the actor
learns from what the critics' step saw. Batch, random steps and replay are those of all agents here; the official code
makes 1,000 random steps, then 1,000 updates at once, and keeps 1,000,000 transitions.

Logged: `critic_loss` (squared error, summed over both critics), `q` (mean value of the batch), `reconstruction_loss`
(mean squared error per pixel and channel), `latent_loss` (half the squared norm of the representation), `actor_loss`,
`entropy` (of the policy, in nats) and `temperature` (the weight of the entropy).
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
    """SAC-AE."""

    feature_dim: int = 50
    """dimension of the representation that actor and critics see"""
    learning_rate: float = 1e-3
    """Adam learning rate"""
    temperature_learning_rate: float = 1e-4
    """Adam learning rate of the entropy temperature (with beta1 = 0.5)"""
    init_temperature: float = 0.1
    """initial entropy temperature (alpha), tuned towards a target entropy of minus the action dimension"""
    discount: float = 0.99
    """discount factor (gamma) per agent step"""
    n_step: int = 1
    """n-step return length: rewards summed before bootstrapping from the target critics"""
    tau: float = 0.01
    """Polyak coefficient (tau) of the target critics"""
    encoder_tau: float = 0.05
    """Polyak coefficient (tau) of the target encoder and its projection"""
    actor_every: int = 2
    """critic updates per update of actor, temperature and target networks"""
    latent_coef: float = 1e-6
    """weight of the L2 penalty on the representation"""
    decoder_weight_decay: float = 1e-7
    """weight decay of the decoder's optimizer"""

    def env_config(self) -> EnvConfig:
        """RGB alone."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=None,
        )


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


class Decoder(nn.Sequential):
    """The encoder's mirror image: z (B, feature_dim) -> (B, channels, H, W)."""

    def __init__(self, feature_dim: int, channels: int, strides: tuple[int, ...], size: int):
        sizes = [size]
        for stride in strides:
            sizes.append((sizes[-1] - 3) // stride + 1)
        layers: list[nn.Module] = [nn.Linear(feature_dim, 32 * sizes[-1] ** 2), nn.Unflatten(1, (32, *sizes[-1:] * 2))]
        for number, stride in reversed(list(enumerate(strides))):
            missed = (sizes[number] - 3) % stride  # rows and columns at the end that the convolution did not see
            outputs = 32 if number else channels
            layers += [nn.ReLU(), nn.ConvTranspose2d(32, outputs, 3, stride, output_padding=missed)]
        super().__init__(*layers)


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
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.orthogonal_(module.weight, 1.0 if isinstance(module, nn.Linear) else nn.init.calculate_gain("relu"))
        nn.init.zeros_(module.bias)


# ---- losses ----


def stack_channels(frames: Tensor) -> Tensor:
    """uint8 (B, k, H, W, c) -> (B, k * c, H, W) in channels-last layout."""
    return frames.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def quantise(rgb: Tensor, noise: Tensor, bits: int = 5) -> Tensor:
    """uint8 frames and noise in [0, 1) of their shape -> what to reconstruct, float32 in [-0.5, 0.5)."""
    return ((rgb >> (8 - bits)) + noise) / 2**bits - 0.5


# ---- agent ----


class Agent(nn.Module):
    """Acts and learns; `optimizers` and the module's state are what a checkpoint holds."""

    def __init__(self, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        self.encoder = Encoder(3 * args.frame_stack, args.conv_strides, args.bfloat16)
        size = self.encoder(torch.zeros(1, 3 * args.frame_stack, args.image_size, args.image_size)).numel()
        self.project = nn.Sequential(nn.Linear(size, args.feature_dim), nn.LayerNorm(args.feature_dim), nn.Tanh())
        self.decoder = Decoder(args.feature_dim, 3 * args.frame_stack, args.conv_strides, args.image_size)
        self.critic = Critic(args.feature_dim, action_dim, args.hidden_dim, args.critic_layer_norm)
        self.actor = Actor(args.feature_dim, action_dim, args.hidden_dim)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_project = copy.deepcopy(self.project).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(np.log(args.init_temperature), dtype=torch.float32))
        self.target_entropy = -float(action_dim)
        self.to(device, memory_format=torch.channels_last)

        encoder = [*self.encoder.parameters(), *self.project.parameters()]
        critic = [*encoder, *self.critic.parameters()]
        decoder = {"params": list(self.decoder.parameters()), "weight_decay": args.decoder_weight_decay}
        self.optimizers = {
            "critic": torch.optim.Adam(critic, args.learning_rate, fused=True),
            "actor": torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True),
            "temperature": torch.optim.Adam([self.log_temperature], args.temperature_learning_rate, betas=(0.5, 0.999)),
            "autoencoder": torch.optim.Adam([{"params": encoder}, decoder], args.learning_rate, fused=True),
        }
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)
            self.autoencoder_loss = torch.compile(self.autoencoder_loss)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def encode(self, rgb: Tensor, target: bool = False) -> Tensor:
        """uint8 (B, 3k, H, W) -> z (B, feature_dim)."""
        encoder, project = (self.target_encoder, self.target_project) if target else (self.encoder, self.project)
        return project(encoder(rgb.float().div_(255).sub_(0.5)).permute(0, 2, 3, 1).flatten(1))

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        z = self.encode(stack_channels(self.tensor(observation["rgb"])))
        return (self.actor.mean(z) if deterministic else self.actor(z)[0]).cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        args = self.args
        batch = replay.sample(args.batch_size)
        tensors = self.tensors(batch)
        loss, z, metrics = self.critic_loss(*tensors)
        self.optimize("critic", loss)

        if number % args.actor_every == 0:
            loss, log_prob = self.actor_loss(z.detach())
            self.optimize("actor", loss)
            temperature = self.log_temperature.exp()
            self.optimize("temperature", (temperature * (-log_prob - self.target_entropy).detach()).mean())
            self.polyak_update(self.target, self.critic, args.tau)
            self.polyak_update(self.target_encoder, self.encoder, args.encoder_tau)
            self.polyak_update(self.target_project, self.project, args.encoder_tau)
            metrics |= {"actor_loss": loss.detach(), "entropy": -log_prob.mean(), "temperature": temperature.detach()}
        loss, autoencoder_metrics = self.autoencoder_loss(tensors[0])
        self.optimize("autoencoder", loss)
        return metrics | autoencoder_metrics

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        rgb, next_rgb = stack_channels(self.tensor(batch.rgb)), stack_channels(self.tensor(batch.next_rgb))
        return rgb, next_rgb, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def critic_loss(
        self, rgb: Tensor, next_rgb: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_action, log_prob = self.actor(self.encode(next_rgb))
            next_z = self.encode(next_rgb, target=True)
            next_value = self.target(next_z, next_action).amin(0) - self.log_temperature.exp() * log_prob
            td_target = reward + discount * next_value
        z = self.encode(rgb)
        q = self.critic(z, action)
        loss = F.mse_loss(q, td_target.expand_as(q)) * 2  # the sum over both critics
        return loss, z, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def actor_loss(self, z: Tensor) -> tuple[Tensor, Tensor]:
        action, log_prob = self.actor(z)
        value = self.critic(z, action).amin(0)
        return (self.log_temperature.exp().detach() * log_prob - value).mean(), log_prob.detach()

    def autoencoder_loss(self, rgb: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.encode(rgb)
        goal = quantise(rgb, torch.rand_like(rgb, dtype=torch.float32))
        reconstruction = F.mse_loss(self.decoder(z), goal)
        latent = 0.5 * z.pow(2).sum(1).mean()
        metrics = {"reconstruction_loss": reconstruction.detach(), "latent_loss": latent.detach()}
        return reconstruction + self.args.latent_coef * latent, metrics

    def optimize(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=[parameter for group in optimizer.param_groups for parameter in group["params"]])
        optimizer.step()

    @staticmethod
    def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
        for old, new in zip(target.parameters(), online.parameters(), strict=True):
            old.data.lerp_(new.data, tau)


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
