"""Semore-SAC: named things as numbers, from a semantic path on RGB and a motion path on flow (arXiv 2512.05172).

While the first steps are taken at random, a vision-language model names what matters in some frames and CLIP says where
it is. The names that they agree on become the vocabulary, and a small convolutional network, the grounder, learns from
these frames to find them in every frame. From then on actor and critics see, for each named thing, where it is, how it
lies, and how flow says that it moves: standardised numbers, no pixels. Neither VLM nor CLIP is needed to act.

Reconstructed from the paper's abstract: that two paths are supervised separately by what VLM and CLIP know, interact,
and are what the policy sees, is the paper's; grounder, numbers, standardising and schedule are ours. Until there is a
vocabulary, and where nothing is named, the agent is DrQ-SAC; with `--no-semantic` it computes the same numbers.

Its diff is to be read against `drq_sac.py`.

Logged: as `drq_sac.py`, and, when the grounder is trained, `grounder_loss` (cross entropy per patch, nats) and `things`
(names in the vocabulary); with `--heads` also `heads_loss` (squared error of predicted reward and numbers).
"""

import copy
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.grounder import Grounder
from semore_bench.pasting import Pasting
from semore_bench.replay import Batch, Replay
from semore_bench.runs import Run, one_line_errors
from semore_bench.things import MOTION, STATIC, THINGS, Standardise, Vocabulary, history, history_size, moments
from wrappers.errors import UserError
from wrappers.flow import relative_flow


@dataclass
class Args(CommonArgs):
    """Semore-SAC."""

    annotator: str = "embedded"
    """annotator: embedded (small, needs no network) or embedded:<folder>, transformers:<model or folder>,
    openai:<base url>#<model>, simulator (of MuJoCo; privileged) or none"""
    annotate_every: int = 4
    """agent steps between two annotated frames"""
    semantic: bool = True
    """see named things (without them this is the baseline)"""
    motion: bool = True
    """see the flow of the named things"""
    interaction: bool = True
    """pool flow within each named thing (otherwise over the whole image)"""
    true_maps: bool = False
    """see the simulator's own class maps instead of the grounder's (privileged), with a tenth of the noise floor"""
    pixels: bool = False
    """see pixels, too: the baseline's representation beside the numbers of the named things"""
    heads: bool = False
    """predict the reward and the next numbers from the representation; of use with --pixels alone"""
    noise_floor: float = 0.03
    """added to the deviation of things' numbers, in half images, so that standardising does not blow up their errors"""
    grounder_updates: int = 500
    """updates of the grounder before the first update of all; later rounds take a quarter of them"""
    grounder_batch: int = 32
    """annotated frames per update of the grounder"""
    grounder_learning_rate: float = 1.5e-3
    """AdamW learning rate of the grounder, at the beginning of its first round"""
    grounder_frames: int = 16
    """annotated frames that the grounder needs; until they are there the agent sees pixels"""
    ground_every: int = 500
    """agent steps from the grounder's first round to its second; each later one takes twice as long, and the second
    half of a run has none; 0 for no others"""
    grounder_pasting: bool = False
    """train the grounder on other backgrounds and colours of things, too, for looks that training never shows"""
    overlay_images: str | None = None
    """folder of pictures to lay over frames, searched recursively (default: made-up textures)"""
    overlay_limit: int = 2000
    """largest number of pictures to lay over frames, drawn with the seed"""
    feature_dim: int = 50
    """dimension of the representation of pixels: with --pixels, and until there are names"""
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

    def env_config(self) -> EnvConfig:
        """RGB and, if things are named, annotations and flow."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=self.flow_estimator if self.semantic and self.motion else None,
            true_things=self.true_maps,
            **(self.guidance if self.semantic and not self.true_maps else {}),
        )

    def resolve(self) -> None:
        super().resolve()
        if self.semantic and self.annotator == "none" and not self.true_maps:
            self.semantic = False
            print("--annotator none: nothing is named, so this is DrQ-SAC (no grounder, no flow)", file=sys.stderr)
        if self.semantic and self.frame_stack < 2:
            raise UserError("named things need --frame-stack 2 or more, to see them move; or type --no-semantic")
        if not 0 < self.noise_floor < np.inf:
            raise UserError(f"--noise-floor must be above 0, got {self.noise_floor}; try 0.03")
        self.require_at_least(1, "grounder_updates", "grounder_batch", "grounder_frames", "overlay_limit")
        self.require_at_least(0, "ground_every")
        if self.true_maps and not (self.semantic and self.interaction):
            raise UserError("--true-maps are numbers of named things with their flow; leave --no-... out")
        if self.heads and not (self.semantic and self.pixels):
            raise UserError("--heads trains a representation of pixels beside named things; add --pixels")


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
        z_dim = args.feature_dim
        if args.semantic:
            self.vocabulary, self.grounder = Vocabulary(), Grounder()
            pictures = args.overlay_images, args.image_size, args.overlay_limit, args.seed
            self.pasting = Pasting(*pictures) if args.grounder_pasting else None
            self.numbers = THINGS * history_size(args.frame_stack)
            self.standardise = Standardise(self.numbers, args.noise_floor * (0.1 if args.true_maps else 1))
            z_dim += self.numbers
        if args.heads:
            self.heads = mlp(z_dim + action_dim, args.hidden_dim, 1 + self.numbers, args.critic_layer_norm)
        self.critic = Critic(z_dim, action_dim, args.hidden_dim, args.critic_layer_norm)
        self.actor = Actor(z_dim, action_dim, args.hidden_dim)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(np.log(args.init_temperature), dtype=torch.float32))
        self.target_entropy = -float(action_dim)
        self.features, self.said = THINGS * (STATIC + MOTION) * args.semantic, ""
        self.to(device, memory_format=torch.channels_last)

        critic = [*self.encoder.parameters(), *self.project.parameters(), *self.critic.parameters()]
        if args.heads:
            critic += self.heads.parameters()
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

    @property
    def sees_things(self) -> bool:
        return self.args.semantic and (self.args.true_maps or len(self.vocabulary) > 0)

    @property
    def sees_pixels(self) -> bool:
        return self.args.pixels or not self.sees_things

    def encode(self, rgb: Tensor | None, things: Tensor | None = None) -> Tensor:
        """uint8 (B, 3k, H, W) and features (B, k, F), of which what is not seen may be None -> z (B, z_dim)."""
        if self.sees_pixels:
            maps = self.encoder(rgb.float().div_(255).sub_(0.5))
            z = self.project(maps.permute(0, 2, 3, 1).flatten(1))
            if not self.args.semantic:
                return z
        else:
            z = things.new_zeros(len(things), self.args.feature_dim)
        # Straight to the MLPs: a projection that learns with the critic would move under it.
        numbers = self.standardise(history(things)) if self.sees_things else z.new_zeros(len(z), self.numbers)
        return torch.cat([z, numbers], 1)

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        """Stacked observations of N environments -> actions (N, A)."""
        rgb = stack_channels(self.tensor(observation["rgb"])) if self.sees_pixels else None
        z = self.encode(rgb, self.tensor(self.features_of(observation)) if self.sees_things else None)
        return (self.actor.mean(z) if deterministic else self.actor(z)[0]).cpu().numpy()

    def features_of(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """Features of stacked frames (N, k, F): the replay's, or computed here where there is none."""
        if "features" in observation:
            return observation["features"]
        rgb, flow = observation["rgb"], observation.get("flow")
        if flow is not None:  # the oldest frame's motion is not looked at
            flow = np.concatenate([flow[:, :1], flow], 1).reshape(-1, *flow.shape[2:])
        return self.describe(rgb.reshape(-1, *rgb.shape[2:]), flow).reshape(*rgb.shape[:2], -1)

    @torch.no_grad()
    def describe(self, rgb: np.ndarray, flow: np.ndarray | None) -> np.ndarray:
        """Features of single frames, float32 (N, F), from uint8 rgb (N, H, W, 3) and flow (N, H, W, 2)."""
        if not self.sees_things:
            return np.zeros((len(rgb), self.features), np.float32)
        maps = self.grounder.maps(rgb, self.vocabulary)
        if flow is not None:
            flow = F.adaptive_avg_pool2d(relative_flow(self.tensor(flow).permute(0, 3, 1, 2).float()), maps.shape[2:])
        return moments(maps, flow, whole=not self.args.interaction).flatten(1).cpu().numpy()

    def explain(self, observation: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        """The named things and where they are in the newest frame, for a film."""
        if not self.sees_things or self.args.true_maps:
            return []
        maps = self.grounder.maps(observation["rgb"][:1, -1], self.vocabulary)[0, : len(self.vocabulary)]
        return list(zip(self.vocabulary.names, maps.cpu().numpy(), strict=True))

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        metrics = self.ground(replay, number) if self.args.semantic else {}
        return metrics | self.learn(replay, number)

    def learn(self, replay: Replay, number: int) -> dict[str, Tensor]:
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

    def ground(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """If it is time to: chooses the vocabulary, trains the grounder, computes the replay's numbers anew."""
        args, first = self.args, number == 0 if self.args.true_maps else not self.sees_things
        if first:
            due = number % (10 if number < 100 else 100) == 0
        else:  # 1, 2, 4, ... times as long after the round before, in the first half of the run
            past, rest = divmod(number, max(1, args.ground_every * args.updates_per_step))
            half = args.total_env_steps / args.action_repeat / 2 - args.random_steps
            due = args.ground_every and rest == 0 and past > 0 and past & (past + 1) == 0
            due = due and number <= half * args.updates_per_step
        if not due:
            return {}
        metrics = {}
        if not args.true_maps:
            enough = replay.annotated_frames >= args.grounder_frames and replay.sample_annotated(1) is not None
            if enough and first:
                self.vocabulary.choose(*replay.named(), replay.names)
            if first:
                self.say_what_is_seen(enough)
            metrics["things"] = torch.tensor(float(len(self.vocabulary)), device=self.device)
            if not (enough and self.sees_things):
                return metrics
            updates, rate = args.grounder_updates, args.grounder_learning_rate
            if not first:  # a shorter round with smaller steps
                updates, rate = -(-updates // 4), 0.3 * rate
            loss = self.grounder.fit(replay, self.vocabulary, updates, args.grounder_batch, rate, self.pasting)
            metrics["grounder_loss"] = loss
            replay.redescribe()
        self.standardise.fit(history(self.tensor(replay.feature_stacks())))
        if first:
            self.start_over(replay, number)
        return metrics

    def say_what_is_seen(self, enough: bool) -> None:
        said = f"named things: {', '.join(self.vocabulary.names)}"
        if not self.sees_things:
            reason = "no annotation names what matters" if enough else f"under {self.args.grounder_frames} annotations"
            said = f"{reason} so far: seeing pixels, as drq_sac does"
        if said != self.said:
            print(said, file=sys.stderr)
        self.said = said

    def start_over(self, replay: Replay, updates: int) -> None:
        """What learned from pixels cannot read things: it learns anew, with as many updates, though at most 2,000."""
        if not updates:
            return
        for part in (self.critic, self.actor):
            part.apply(orthogonal)
        self.target.load_state_dict(self.critic.state_dict())
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for number in range(min(updates, 2000)):
            self.learn(replay, number)

    def augment(self, batch: Batch) -> tuple:
        rgbs, things = [None, None], [None, None]
        if self.sees_pixels:
            size = 2, len(batch.reward), 2
            offset = torch.randint(-self.args.shift, self.args.shift + 1, size, dtype=torch.int32).to(self.device)
            rgbs = map(random_shift, (self.tensor(batch.rgb), self.tensor(batch.next_rgb)), offset)
        if self.sees_things:
            things = self.tensor(batch.features), self.tensor(batch.next_features)
        seen, next_seen = zip(rgbs, things, strict=True)
        return seen, next_seen, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def critic_loss(
        self, seen: tuple, next_seen: tuple, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.encode(*next_seen)
            next_action, log_prob = self.actor(next_z)
            next_value = self.target(next_z, next_action).amin(0) - self.log_temperature.exp() * log_prob
            td_target = reward + discount * next_value
        z = self.encode(*seen)
        q = self.critic(z, action)
        loss = F.mse_loss(q, td_target.expand_as(q)) * 2  # the sum over both critics
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean()}
        if self.args.heads and self.sees_things:
            target = torch.cat([reward[:, None], self.standardise(history(next_seen[1]))], 1)
            heads_loss = F.mse_loss(self.heads(torch.cat([z, action], 1)), target)
            loss, metrics["heads_loss"] = loss + heads_loss, heads_loss.detach()
        return loss, z, metrics

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
        replay = run.make_replay(args.n_step, args.discount, features=agent.features)
        replay.describe = agent.describe if args.semantic and not args.true_maps else None
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:  # while the workers step and render
                run.log(agent.update(replay, number))
            replay.add(run.receive())


if __name__ == "__main__":
    main(tyro.cli(Args))
