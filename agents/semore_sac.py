"""Semore-SAC: semantics from RGB and motion from flow, each taught by a VLM's guidance (arXiv 2512.05172).

Two convolutional paths see the frames and their motion. What matters in a frame, named by a vision-language model and
located by CLIP, teaches the semantic path; optical flow, weighted by what matters, teaches the motion path. The paths
exchange information by attention and fuse into the representation that SAC decides with; the guidance is not needed
to act. Reconstructed from the paper's abstract: no official code, loss weight or layer size is public. Ours: motion is
seen at half the resolution, guidance takes steps of its own beside the critic's, and whether an object moves is left to
the flow: what the VLM says of that weighs nothing.

The twin without all this is `drq_sac.py`: `diff` the two files. With `--no-semantic --no-motion --no-interaction
--no-reward-head` this file computes the same numbers as the twin.

Logged: as `drq_sac.py`, and `map_loss` (KL divergence from CLIP's patch probabilities, nats), `caption_loss`
(contrastive, nats), `motion_loss` (Huber, of flow over its bound), `reward_loss` (squared error of the predicted
n-step reward) and `interaction` (mean absolute gate of the exchange between the paths, 0 to begin with).
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
    """Semore-SAC."""

    annotator: str = "embedded"
    """who names what matters in a frame: embedded (small, needs no network), transformers:<model or folder>,
    openai:<base url>#<model>, simulator (of MuJoCo; privileged) or none"""
    semantic: bool = True
    """teach the semantic path with class maps and captions"""
    motion: bool = True
    """have a motion path, taught by flow"""
    interaction: bool = True
    """let the two paths exchange information by attention"""
    reward_head: bool = True
    """predict the reward from the representation"""
    flow_input: bool = True
    """show flow to the motion path (otherwise frame differences alone)"""
    pretrain_updates: int = 0
    """updates of the guidance losses alone before the first update of all"""
    reward_coef: float = 1.0
    """weight of the reward loss"""
    caption_coef: float = 0.1
    """weight of the caption loss within the semantic loss"""
    guidance_learning_rate: float = 1e-3
    """of Adam, for both paths and their heads, in the steps that guidance takes"""
    guidance_batch: float = 0.25
    """annotated frames per guidance loss, as a share of the batch size"""
    guidance_every: int = 4
    """updates per guidance loss"""
    feature_dim: int = 50
    """length of the representation that actor and critics see"""
    learning_rate: float = 1e-3
    """of Adam, for encoder, critics, actor and temperature"""
    init_temperature: float = 0.1
    """entropy weight to begin with; it is tuned towards an entropy of minus the number of action dimensions"""
    discount: float = 0.99
    """per agent step"""
    n_step: int = 1
    """rewards summed before the value of what follows is estimated"""
    tau: float = 0.01
    """share of the critics that moves into their targets at a time"""
    actor_every: int = 2
    """updates of the critics per update of actor, temperature and targets"""
    shift: int = 4
    """random shift in pixels"""

    def env_config(self) -> EnvConfig:
        """RGB, flow if there is a motion path, and annotations."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=self.flow_estimator if self.motion else None,
            **(self.guidance if self.semantic or self.motion else {}),
        )

    def resolve(self) -> None:
        super().resolve()
        if self.guidance_every < 1:
            raise UserError(f"--guidance-every must be at least 1, got {self.guidance_every}")
        if self.motion and self.frame_stack < 2:
            raise UserError("the motion path needs --frame-stack 2 or more; or type --no-motion")
        if not self.motion:
            self.interaction = False  # there is nothing to interact with


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


class Interaction(nn.Module):
    """What each path takes from the other: x + gate * attention(query x, key and value y), on at most 7x7 tokens.

    The maps are rows of pixels here, (B, width * width, channels), as they lie in memory; they are pooled (adaptive
    average) and grown again (nearest) by constant matrices: products are faster than resizing.
    """

    def __init__(self, widths: tuple[int, int], channels: int = 32):
        super().__init__()
        for name, width in zip(("semantics", "motion"), widths, strict=True):
            size = max(1, min(7, width // 2))
            pixels, tokens = (torch.eye(n * n).view(1, n * n, n, n) for n in (width, size))
            pool, grow = F.adaptive_avg_pool2d(pixels, size), F.interpolate(tokens, (width, width))
            self.register_buffer(f"pool_{name}", pool[0].flatten(1).T, persistent=False)
            self.register_buffer(f"grow_{name}", grow[0].flatten(1).T, persistent=False)
        self.semantics, self.motion = (nn.Linear(channels, 3 * channels) for _ in range(2))  # query, key and value
        self.gate = nn.Parameter(torch.zeros(2, channels))  # closed to begin with: two independent paths

    def forward(self, semantics: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
        own = self.semantics(self.pool_semantics @ semantics).chunk(3, -1)
        others = self.motion(self.pool_motion @ motion).chunk(3, -1)
        to_semantics = self.gate[0] * attend(own[0], *others[1:])
        to_motion = self.gate[1] * attend(others[0], *own[1:])
        return (
            torch.baddbmm(semantics, self.grow_semantics.expand(len(semantics), -1, -1), to_semantics),
            torch.baddbmm(motion, self.grow_motion.expand(len(motion), -1, -1), to_motion),
        )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention written out: for so few tokens faster on a CPU than what is made for long sequences."""
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


class Guidance(nn.Module):
    """The heads that are taught, on the paths' maps (B, 32, h, w) before they interact."""

    def __init__(self, args: "Args", grid: int, embedding_dim: int):
        super().__init__()
        self.grid = grid
        if args.semantic:
            self.classes = nn.Conv2d(32, embedding_dim, 1)
            self.caption = nn.Linear(32, embedding_dim)
        if args.motion:
            self.flow = nn.Conv2d(32, 2, 1)

    def on_grid(self, maps: Tensor) -> Tensor:
        if maps.shape[-1] < self.grid:
            return F.interpolate(maps, (self.grid, self.grid), mode="bilinear")
        return F.adaptive_avg_pool2d(maps, self.grid)


class Critic(nn.Module):
    """Two Q functions: z (B, feature_dim), action (B, A) -> (2, B)."""

    def __init__(self, feature_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self.q1 = mlp(feature_dim + action_dim, hidden_dim, 1)
        self.q2 = mlp(feature_dim + action_dim, hidden_dim, 1)

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


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


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


def motion_input(rgb: Tensor, flow: Tensor | None) -> Tensor:
    """What the motion path sees, at half the resolution and in channels-last layout: each frame of rgb (B, 3k, H, W)
    minus the one before it and, unless it is None, flow over its bound, uint8 (B, 2(k-1), H, W)."""
    frames = F.avg_pool2d(rgb, 2)
    seen = [frames[:, 3:] - frames[:, :-3]]
    if flow is not None:
        seen.append(F.avg_pool2d(flow.float(), 2).sub_(128).div_(127))
    return torch.cat(seen, 1)


def map_loss(features: Tensor, classes: Tensor, present: Tensor, probabilities: Tensor) -> Tensor:
    """Mean over patches of KL(P || softmax_k(50 <f_p, t_k>)); features (B, d, G, G), classes (B, K, d)."""
    similarity = torch.einsum("bdij,bkd->bkij", F.normalize(features, dim=1), classes)
    logits = (50 * similarity).masked_fill(~present[:, :, None, None], -1e4)
    return F.kl_div(logits.log_softmax(1), probabilities, reduction="none").sum(1).mean()


def caption_loss(predicted: Tensor, captions: Tensor, caption_id: Tensor) -> Tensor:
    """Symmetric InfoNCE of frames and captions (B, d); equal captions are positives of each other."""
    logits = 20 * F.normalize(predicted, dim=1) @ captions.T
    positive = (caption_id[:, None] == caption_id).float()
    positive = positive / positive.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, positive) + F.cross_entropy(logits.T, positive))


def motion_loss(predicted: Tensor, flow: Tensor, relevance: Tensor) -> Tensor:
    """Huber loss of flow (B, 2, G, G) over its bound, weighted by 0.1 + relevance (B, G, G)."""
    weight = 0.1 + relevance
    return (weight * F.huber_loss(predicted, flow, reduction="none").sum(1)).sum() / weight.sum()


# ---- agent ----


class Agent(nn.Module):
    """Acts and learns; `optimizers` and the module's state are what a checkpoint holds."""

    def __init__(self, action_dim: int, args: Args, device: torch.device, grid: int = 8, embedding_dim: int = 64):
        super().__init__()
        self.args, self.device = args, device
        self.encoder = Encoder(3 * args.frame_stack, args.conv_strides, args.bfloat16)
        size = self.encoder(torch.zeros(1, 3 * args.frame_stack, args.image_size, args.image_size)).numel()
        if args.motion:
            channels, half = (3 + 2 * args.flow_input) * (args.frame_stack - 1), args.image_size // 2
            self.motion_encoder = Encoder(channels, (2, 1, 1, 1), args.bfloat16)  # half the resolution: half the cost
            sizes = size, self.motion_encoder(torch.zeros(1, channels, half, half)).numel()
            size = sum(sizes)
        if args.interaction:
            self.interaction = Interaction(tuple(round((n / 32) ** 0.5) for n in sizes))
        if args.semantic or args.motion:
            self.guidance = Guidance(args, grid, embedding_dim)
        if args.reward_head:
            self.reward = nn.Sequential(nn.Linear(args.feature_dim + action_dim, 512), nn.ReLU(), nn.Linear(512, 1))
        self.project = nn.Sequential(nn.Linear(size, args.feature_dim), nn.LayerNorm(args.feature_dim), nn.Tanh())
        self.critic = Critic(args.feature_dim, action_dim, args.hidden_dim)
        self.actor = Actor(args.feature_dim, action_dim, args.hidden_dim)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(np.log(args.init_temperature), dtype=torch.float32))
        self.target_entropy = -float(action_dim)
        self.to(device, memory_format=torch.channels_last)

        heads = self.guidance.parameters() if args.semantic or args.motion else ()
        others = {*self.actor.parameters(), *self.target.parameters(), self.log_temperature, *heads}
        critic = [parameter for parameter in self.parameters() if parameter not in others]
        self.optimizers = {
            "critic": torch.optim.Adam(critic, args.learning_rate, fused=True),
            "actor": torch.optim.Adam(self.actor.parameters(), args.learning_rate, fused=True),
            "temperature": torch.optim.Adam([self.log_temperature], args.learning_rate),
        }
        if args.semantic or args.motion:
            # Steps of its own: beside the critic's loss, which grows with the rewards, guidance would not be felt.
            paths = nn.ModuleList([self.encoder, self.motion_encoder] if args.motion else [self.encoder])
            guidance = [*paths.parameters(), *self.guidance.parameters()]
            self.optimizers["guidance"] = torch.optim.Adam(guidance, args.guidance_learning_rate, fused=True)
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss)
            self.actor_loss = torch.compile(self.actor_loss)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def paths(self, rgb: Tensor, flow: Tensor | None) -> tuple[Tensor, ...]:
        """uint8 rgb (B, 3k, H, W) and flow (B, 2(k-1), H, W) -> maps of the semantic and, if there is one, the motion
        path, (B, 32, h, w), each of its own size."""
        rgb = rgb.float().div_(255).sub_(0.5)
        semantics = self.encoder(rgb)
        if not self.args.motion:
            return (semantics,)
        return semantics, self.motion_encoder(motion_input(rgb, flow if self.args.flow_input else None))

    def encode(self, rgb: Tensor, flow: Tensor | None = None) -> Tensor:
        """The same inputs -> z (B, feature_dim)."""
        maps = [path.permute(0, 2, 3, 1).flatten(1, 2) for path in self.paths(rgb, flow)]
        if self.args.interaction:
            maps = self.interaction(*maps)
        return self.project(torch.cat([path.flatten(1) for path in maps], 1))

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        flow = stack_channels(self.tensor(observation["flow"])) if self.args.motion else None
        z = self.encode(stack_channels(self.tensor(observation["rgb"])), flow)
        return (self.actor.mean(z) if deterministic else self.actor(z)[0]).cpu().numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        args = self.args
        batch = replay.sample(args.batch_size)
        if number == 0:
            for _ in range(args.pretrain_updates):
                self.guide(replay, replay.sample(args.batch_size))
        loss, z, metrics = self.critic_loss(*self.augment(batch))
        self.step("critic", loss)
        if "guidance" in self.optimizers and number % args.guidance_every == 0:
            metrics |= self.guide(replay, batch)

        if number % args.actor_every == 0:
            loss, log_prob = self.actor_loss(z.detach())
            self.step("actor", loss)
            temperature = self.log_temperature.exp()
            self.step("temperature", (temperature * (-log_prob - self.target_entropy).detach()).mean())
            for target, online in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                target.data.lerp_(online.data, args.tau)
            metrics |= {"actor_loss": loss.detach(), "entropy": -log_prob.mean(), "temperature": temperature.detach()}
        return metrics

    def guide(self, replay: Replay, batch: Batch) -> dict[str, Tensor]:
        """A step of both paths on what is known; returns what to log."""
        loss, metrics = self.guidance_loss(*self.taught(replay, batch))
        if metrics:
            self.step("guidance", loss)
        return metrics

    def augment(self, batch: Batch) -> tuple:
        size = 2, len(batch.reward), 2
        offset = torch.randint(-self.args.shift, self.args.shift + 1, size, dtype=torch.int32).to(self.device)
        views = (batch.rgb, batch.flow), (batch.next_rgb, batch.next_flow)
        seen, next_seen = (
            tuple(random_shift(self.tensor(frames), shift) for frames in view if frames is not None)
            for view, shift in zip(views, offset, strict=True)  # flow moves with its frames
        )
        return seen, next_seen, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def taught(self, replay: Replay, batch: Batch) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Frames for the guidance losses, not shifted, and what is known of them: nothing, for want of annotations,
        of the first frames of `batch`."""
        count = max(2, round(self.args.guidance_batch * self.args.batch_size))
        annotated = replay.sample_annotated(count)
        frames = annotated or batch
        rgb = stack_channels(self.tensor(frames.rgb[:count]))
        flow = stack_channels(self.tensor(frames.flow[:count])) if self.args.motion else None
        names = "patch_probabilities relevance class_embeddings class_present caption_embedding caption_id".split()
        return rgb, flow, {name: self.tensor(getattr(annotated, name)) for name in names} if annotated else {}

    def guidance_loss(
        self, rgb: Tensor, flow: Tensor | None, known: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of what can be taught now, and what to log. No weights: the paths share nothing that they would
        weigh against each other."""
        args, heads = self.args, self.guidance
        semantics, *motion = self.paths(rgb, flow)
        loss, metrics = torch.zeros((), device=rgb.device), {}
        if args.semantic and known:
            features = heads.classes(heads.on_grid(semantics))
            maps = map_loss(features, known["class_embeddings"], known["class_present"], known["patch_probabilities"])
            words = caption_loss(heads.caption(semantics.mean((2, 3))), known["caption_embedding"], known["caption_id"])
            loss = loss + maps + args.caption_coef * words
            metrics = {"map_loss": maps.detach(), "caption_loss": words.detach()}
        if args.motion:
            target = F.adaptive_avg_pool2d((flow[:, -2:].float() - 128) / 127, heads.grid)
            relevance = known.get("relevance", torch.zeros_like(target[:, 0]))
            moves = motion_loss(heads.flow(heads.on_grid(*motion)), target, relevance)
            loss, metrics["motion_loss"] = loss + moves, moves.detach()
        return loss, metrics

    def critic_loss(
        self, seen: tuple[Tensor, ...], next_seen: tuple[Tensor, ...], action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.encode(*next_seen)
            next_action, log_prob = self.actor(next_z)
            next_value = self.target(next_z, next_action).amin(0) - self.log_temperature.exp() * log_prob
            goal = reward + discount * next_value
        z = self.encode(*seen)
        q = self.critic(z, action)
        loss = F.mse_loss(q, goal.expand_as(q)) * 2  # the sum over both critics
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean()}
        if self.args.reward_head:
            reward_loss = F.mse_loss(self.reward(torch.cat([z, action], -1)).squeeze(-1), reward)
            loss = loss + self.args.reward_coef * reward_loss
            metrics["reward_loss"] = reward_loss.detach()
        if self.args.interaction:
            metrics["interaction"] = self.interaction.gate.detach().abs().mean()
        return loss, z, metrics

    def actor_loss(self, z: Tensor) -> tuple[Tensor, Tensor]:
        action, log_prob = self.actor(z)
        value = self.critic(z, action).amin(0)
        return (self.log_temperature.exp().detach() * log_prob - value).mean(), log_prob.detach()

    def step(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()


# ---- main ----


@one_line_errors
def main(args: Args) -> None:
    with Run(args, __file__) as run:
        agent = Agent(run.action_dim, args, run.device, *run.guidance_shape)
        replay = run.make_replay(args.n_step, args.discount)
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:  # while the workers step and render
                run.log(agent.update(replay, number))
            replay.add(run.receive())


if __name__ == "__main__":
    main(tyro.cli(Args))
