"""CLIP-SAC: soft actor-critic on what a frozen CLIP sees; what pre-trained features alone buy.

CLIP (Radford et al. 2021, arXiv 2103.00020) looks at every frame; its features of patches, averaged over a coarse
grid, are projected to the representation of DrQ-SAC. Nothing of CLIP is trained. Frozen features for control were
compared by Parisi et al. (2022, arXiv 2203.03580), who find that where things are must not be lost, hence the grid.

Its diff is to be read against `drq_sac.py`: features of patches in place of pixels, shifted by up to a patch. Features
are computed once for each distinct frame and cached. Before the first update they are whitened (PCA of the random
steps): frames of one scene differ in directions of little variance, such as a pole's angle, which a projection would
otherwise learn last.

Logged: `critic_loss` (squared error, summed over both critics), `q` (mean value of the batch), `actor_loss`, `entropy`
(of the policy, in nats) and `temperature` (the weight of the entropy).
"""

import copy
import hashlib
import sys
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
from wrappers.backends.annotators import make_clip
from wrappers.backends.clip import ClipGrounding
from wrappers.errors import UserError


@dataclass
class Args(CommonArgs):
    """CLIP-SAC."""

    clip: str = "embedded"
    """the frozen CLIP: embedded, <model>:<weights> as open_clip names them, or a folder in its format"""
    clip_grid: int = 4
    """cells per side of the average pooling over patch features; 0: the embedding of the whole frame alone"""
    components: int = 128
    """principal components of the features that are kept (whitened PCA)"""
    shift: int = 1
    """largest random shift, in patches"""

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
        """RGB alone."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=None,
        )

    @property
    def guidance_source(self) -> str:
        return f"CLIP {self.clip}"

    def resolve(self) -> None:
        super().resolve()
        self.require_at_least(0, "clip_grid")
        self.require_at_least(1, "components")


# ---- networks ----


class ClipFeatures:
    """What a frozen CLIP sees in stacks of frames: uint8 (B, k, H, W, 3) -> float16 (B, k, G, G, d).

    Each distinct frame is looked at once, when it is first needed, and by itself: its features do not depend on the
    frames around it, so that a run that is continued, with an empty memory, computes the same. Not a module: the
    weights belong to no checkpoint.

    Args:
        clip: the model.
        patches: look at patches, or (G = 1) at the whole frame.
        capacity: frames of training remembered, at 2 bytes per feature; the oldest are forgotten.
    """

    def __init__(self, clip: ClipGrounding, patches: bool, capacity: int):
        self.clip, self.patches, self.capacity = clip, patches, capacity
        self.memory: dict[bytes, np.ndarray] = {}
        self.recent: dict[bytes, np.ndarray] = {}

    def __call__(self, stacks: np.ndarray, again: bool = True) -> np.ndarray:
        """`again`: they may come back; frames of an evaluation do not, but in the next stacks."""
        memory, capacity, rows = (self.memory, self.capacity, []) if again else (self.recent, 64, [])
        for frame in stacks.reshape(-1, *stacks.shape[2:]):
            key = hashlib.blake2b(frame, digest_size=16).digest()
            if key not in memory:
                memory[key] = self.look(frame).astype(np.float16)
            rows.append(memory[key])
        while len(memory) > capacity:
            del memory[next(iter(memory))]
        return np.stack(rows).reshape(*stacks.shape[:2], *rows[0].shape)

    def look(self, frame: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> (G, G, d)."""
        return self.clip.patch_features([frame])[0] if self.patches else self.clip.image_embeddings([frame])[None]


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


# ---- losses ----


def random_shift(frames: Tensor, offset: Tensor) -> Tensor:
    """Shifts each sample by its own offset, repeating the border: the crop of an edge-padded image.

    frames (B, k, H, W, c), offset int32 (B, 2) -> (B, k * c, H, W) in channels-last layout.
    """
    batch, stack, height, width, channels = frames.shape
    y = (torch.arange(height, dtype=offset.dtype, device=frames.device) + offset[:, :1]).clamp(0, height - 1)
    x = (torch.arange(width, dtype=offset.dtype, device=frames.device) + offset[:, 1:]).clamp(0, width - 1)
    image = torch.arange(batch * stack, dtype=offset.dtype, device=frames.device).view(batch, 1, 1, stack)
    rows = (image * height + y[:, :, None, None]) * width + x[:, None, :, None]
    shifted = frames.reshape(-1, channels).index_select(0, rows.reshape(-1))
    return shifted.view(batch, height, width, stack * channels).permute(0, 3, 1, 2)


# ---- agent ----


class Agent(nn.Module):
    """Acts and learns; `optimizers` and the module's state are what a checkpoint holds."""

    def __init__(self, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        clip = make_clip(args.clip, str(device))
        if args.clip_grid > clip.grid:
            raise UserError(
                f"--clip-grid must be at most {clip.grid}, the model's patches per side, got {args.clip_grid}"
            )
        frames = min(args.replay_capacity, -(-args.total_env_steps // args.action_repeat))
        self.features = ClipFeatures(clip, args.clip_grid > 0, frames)
        per_frame = 2 * clip.dim * (clip.grid**2 if args.clip_grid else 1)
        print(f"features of up to {frames:,} frames will take {frames * per_frame:,} bytes of memory", file=sys.stderr)
        size = args.frame_stack * clip.dim * (args.clip_grid**2 or 1)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("whiten", torch.zeros(size, min(args.components, size)))
        self.project = nn.Sequential(
            nn.Linear(self.whiten.shape[1], args.feature_dim), nn.LayerNorm(args.feature_dim), nn.Tanh()
        )
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

    def encode(self, seen: Tensor) -> Tensor:
        """Features (B, k * d, G, G) -> z (B, feature_dim)."""
        return self.project((self.on_grid(seen) - self.mean) @ self.whiten)

    def on_grid(self, seen: Tensor) -> Tensor:
        """Features (B, k * d, G, G) -> (B, clip_grid * clip_grid * k * d)."""
        return F.adaptive_avg_pool2d(seen.float(), self.args.clip_grid or 1).permute(0, 2, 3, 1).flatten(1)

    def look(self, stacks: np.ndarray, offset: Tensor | None = None, again: bool = True) -> Tensor:
        """Stacked frames (B, k, H, W, 3), shifted by offset (B, 2), in patches -> features (B, k * d, G, G)."""
        offset = torch.zeros(len(stacks), 2, dtype=torch.int32) if offset is None else offset
        return random_shift(self.tensor(self.features(stacks, again)), offset.to(self.device))

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        z = self.encode(self.look(observation["rgb"], again=not deterministic))
        return (self.actor.mean(z) if deterministic else self.actor(z)[0]).cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        args = self.args
        if number == 0:
            self.find_components(self.on_grid(self.look(replay.sample(512).rgb)))
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

    def find_components(self, seen: Tensor) -> None:
        """Centres and whitens features such as these (B, n); components of next to no variance are not blown up."""
        self.mean.copy_(seen.mean(0))
        _, scale, directions = torch.linalg.svd(seen - self.mean, full_matrices=False)
        count = min(self.whiten.shape[1], len(scale))
        deviation = scale[:count, None] / len(seen) ** 0.5
        self.whiten.zero_()[:, :count] = (directions[:count] / (deviation + 1e-3 * deviation[0] + 1e-8)).T

    def augment(self, batch: Batch) -> tuple[Tensor, ...]:
        size = 2, len(batch.reward), 2
        offset = torch.randint(-self.args.shift, self.args.shift + 1, size, dtype=torch.int32)
        seen, next_seen = self.look(batch.rgb, offset[0]), self.look(batch.next_rgb, offset[1])
        return seen, next_seen, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def critic_loss(
        self, seen: Tensor, next_seen: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.encode(next_seen)
            next_action, log_prob = self.actor(next_z)
            next_value = self.target(next_z, next_action).amin(0) - self.log_temperature.exp() * log_prob
            td_target = reward + discount * next_value
        z = self.encode(seen)
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
        agent = Agent(run.action_dim, args, run.device)
        replay = run.make_replay(args.n_step, args.discount)
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:  # while the workers step and render
                run.log(agent.update(replay, number))
            replay.add(run.receive())


if __name__ == "__main__":
    main(tyro.cli(Args))
