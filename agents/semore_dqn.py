"""Semore-DQN: named things as numbers, for discrete actions: what `semore_sac.py` is to DrQ-SAC (arXiv 2512.05172).

While the first steps are taken at random, a vision-language model names what matters in some frames and CLIP says where
it is. The names that they agree on become the vocabulary, and a small convolutional network, the grounder, learns from
these frames to find them in every frame. From then on the Q function sees, for each named thing, where it is, how it
lies, and how flow says that it moves: standardised numbers, no pixels. Neither VLM nor CLIP is needed to act.

Reconstructed from the paper's abstract, as `semore_sac.py`, which says what is the paper's. Until there is a
vocabulary, and where nothing is named, the agent is `drq_dqn.py`. Its diff is to be read against `drq_dqn.py`: with
`--no-semantic` both compute the same numbers.

Logged: as `drq_dqn.py`, and, when the grounder is trained, `grounder_loss` (cross entropy per patch, nats) and `things`
(names in the vocabulary).
"""

import copy
import sys
from dataclasses import dataclass, replace

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
from semore_bench.transitions import Step
from wrappers.errors import UserError
from wrappers.flow import relative_flow


@dataclass
class Args(CommonArgs):
    """Semore-DQN."""

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
    pixels: bool = False
    """see pixels, too: the baseline's representation beside the numbers of the named things"""
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
    learning_rate: float = 1e-4
    """Adam learning rate"""
    adam_epsilon: float = 1.5e-4
    """of Adam"""
    max_gradient_norm: float = 10.0
    """longer gradients are cut to this length"""
    discount: float = 0.99
    """discount factor (gamma) per agent step"""
    n_step: int = 10
    """n-step return length: rewards summed before bootstrapping from the target critics"""
    tau: float = 0.01
    """Polyak coefficient (tau) of the target critics"""
    shift: int = 4
    """largest random shift, in pixels"""
    epsilon: float = 0.1
    """share of random actions at last"""
    epsilon_steps: int | None = None
    """agent steps after the random ones in which that share falls from 1 (default: 5,000, at most a quarter of all)"""
    clip_rewards: bool = True
    """learn from rewards cut to [-1, 1], as on Atari; the returns in the logs are not"""
    sticky_actions: float | None = None
    """probability that a simulator step repeats the action before instead (default: the environment's own, 0.25 for
    ALE/...-v5)"""
    life_loss: bool = True
    """learn that nothing follows a lost life, where the environment counts lives"""

    def env_config(self) -> EnvConfig:
        """RGB and, if things are named, annotations and flow."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=self.flow_estimator if self.semantic and self.motion else None,
            actions="discrete",
            sticky_actions=self.sticky_actions,
            life_loss=self.life_loss,
            **(self.guidance if self.semantic else {}),
        )

    def resolve(self) -> None:
        super().resolve()
        if self.semantic and self.annotator == "none":
            self.semantic = False
            print("--annotator none: nothing is named, so this is DrQ-DQN (no grounder, no flow)", file=sys.stderr)
        if self.semantic and self.frame_stack < 2:
            raise UserError("named things need --frame-stack 2 or more, to see them move; or type --no-semantic")
        if not 0 < self.noise_floor < np.inf:
            raise UserError(f"--noise-floor must be above 0, got {self.noise_floor}; try 0.03")
        self.require_at_least(1, "grounder_updates", "grounder_batch", "grounder_frames", "overlay_limit")
        self.require_at_least(0, "ground_every")
        if self.epsilon_steps is None:
            self.epsilon_steps = min(5000, self.total_env_steps // self.action_repeat // 4)
        for name in ("epsilon", "sticky_actions"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise UserError(f"--{name.replace('_', '-')} is a probability, from 0 to 1, not {getattr(self, name)}")

    def epsilon_at(self, agent_step: int) -> float:
        """The share of random actions, which falls in a straight line."""
        done = (agent_step - self.random_steps) / max(1, self.epsilon_steps)
        return 1 + min(max(done, 0.0), 1.0) * (self.epsilon - 1)


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
    """A dueling Q function (Wang et al. 2016): z (B, feature_dim) -> the value of each action (B, A)."""

    def __init__(self, feature_dim: int, actions: int, hidden_dim: int, layer_norm: bool = False):
        super().__init__()
        self.value = mlp(feature_dim, hidden_dim, 1, layer_norm)
        self.advantage = mlp(feature_dim, hidden_dim, actions, layer_norm)

    def forward(self, z: Tensor) -> Tensor:
        advantage = self.advantage(z)
        return self.value(z) + advantage - advantage.mean(1, keepdim=True)


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


def mean_colour(frames: Tensor) -> Tensor:
    """The mean of uint8 frames (B, k, H, W, c) in 0-1, per channel of a stack: (k * c, 1, 1)."""
    return frames.float().mean((0, 1, 2, 3)).div(255).repeat(frames.shape[1]).view(-1, 1, 1)


def clipped(steps: list[Step]) -> list[Step]:
    """The same steps with rewards in [-1, 1]."""
    return [replace(step, reward=float(np.clip(step.reward, -1, 1))) for step in steps]


# ---- agent ----


class Agent(nn.Module):
    """Acts and learns; `optimizers` and the module's state are what a checkpoint holds."""

    def __init__(self, actions: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device, self.actions = args, device, actions
        self.encoder = Encoder(3 * args.frame_stack, args.conv_strides, args.bfloat16)
        size = self.encoder(torch.zeros(1, 3 * args.frame_stack, args.image_size, args.image_size)).numel()
        self.project = nn.Sequential(nn.Linear(size, args.feature_dim), nn.LayerNorm(args.feature_dim), nn.Tanh())
        z_dim = args.feature_dim
        if args.semantic:
            self.vocabulary, self.grounder = Vocabulary(), Grounder()
            pictures = args.overlay_images, args.image_size, args.overlay_limit, args.seed
            self.pasting = Pasting(*pictures) if args.grounder_pasting else None
            self.numbers = THINGS * history_size(args.frame_stack)
            self.standardise = Standardise(self.numbers, args.noise_floor)
            z_dim += self.numbers
        self.critic = Critic(z_dim, actions, args.hidden_dim, args.critic_layer_norm)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("colour", torch.full((3 * args.frame_stack, 1, 1), 0.5))  # of the first batch, on average
        self.features, self.said = THINGS * (STATIC + MOTION) * args.semantic, ""
        self.to(device, memory_format=torch.channels_last)

        critic = [*self.encoder.parameters(), *self.project.parameters(), *self.critic.parameters()]
        self.optimizers = {
            "critic": torch.optim.Adam(critic, args.learning_rate, eps=args.adam_epsilon, fused=True),
        }
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @property
    def sees_things(self) -> bool:
        return self.args.semantic and len(self.vocabulary) > 0

    @property
    def sees_pixels(self) -> bool:
        return self.args.pixels or not self.sees_things

    def encode(self, rgb: Tensor | None, things: Tensor | None = None) -> Tensor:
        """uint8 (B, 3k, H, W) and features (B, k, F), of which what is not seen may be None -> z (B, z_dim)."""
        if self.sees_pixels:
            maps = self.encoder(rgb.float().div_(255).sub_(self.colour))
            z = self.project(maps.permute(0, 2, 3, 1).flatten(1))
            if not self.args.semantic:
                return z
        else:
            z = things.new_zeros(len(things), self.args.feature_dim)
        # Straight to the MLPs: a projection that learns with the critic would move under it.
        numbers = self.standardise(history(things)) if self.sees_things else z.new_zeros(len(z), self.numbers)
        return torch.cat([z, numbers], 1)

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False, epsilon: float = 0.0) -> np.ndarray:
        """Stacked observations of N environments -> actions (N,): the best ones, or random ones with `epsilon`."""
        rgb = stack_channels(self.tensor(observation["rgb"])) if self.sees_pixels else None
        z = self.encode(rgb, self.tensor(self.features_of(observation)) if self.sees_things else None)
        best = self.critic(z).argmax(1).cpu()
        if deterministic:
            return best.numpy()
        explore, random = torch.rand(len(best)) < epsilon, torch.randint(self.actions, best.shape)
        return torch.where(explore, random, best).numpy()

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
        if not self.sees_things:
            return []
        maps = self.grounder.maps(observation["rgb"][:1, -1], self.vocabulary)[0, : len(self.vocabulary)]
        return list(zip(self.vocabulary.names, maps.cpu().numpy(), strict=True))

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        metrics = self.ground(replay, number) if self.args.semantic else {}
        return metrics | self.learn(replay, number)

    def learn(self, replay: Replay, number: int) -> dict[str, Tensor]:
        batch = replay.sample(self.args.batch_size)
        if number == 0 and batch.rgb is not None:  # on white or black ground, what matters would be little beside it
            self.colour.copy_(mean_colour(self.tensor(batch.rgb)))
        loss, metrics = self.critic_loss(*self.augment(batch))
        self.optimize("critic", loss)
        for target, online in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            target.data.lerp_(online.data, self.args.tau)
        return metrics

    def ground(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """If it is time to: chooses the vocabulary, trains the grounder, computes the replay's numbers anew."""
        args, first = self.args, not self.sees_things
        if first:
            due = number % (10 if number < 100 else 100) == 0
        else:  # 1, 2, 4, ... times as long after the round before, in the first half of the run
            past, rest = divmod(number, max(1, args.ground_every * args.updates_per_step))
            half = args.total_env_steps / args.action_repeat / 2 - args.random_steps
            due = args.ground_every and rest == 0 and past > 0 and past & (past + 1) == 0
            due = due and number <= half * args.updates_per_step
        if not due:
            return {}
        enough = replay.annotated_frames >= args.grounder_frames and replay.sample_annotated(1) is not None
        if enough and first:
            self.vocabulary.choose(*replay.named(), replay.names)
        if first:
            self.say_what_is_seen(enough)
        metrics = {"things": torch.tensor(float(len(self.vocabulary)), device=self.device)}
        if not (enough and self.sees_things):
            return metrics
        updates, rate = args.grounder_updates, args.grounder_learning_rate
        if not first:  # a shorter round with smaller steps
            updates, rate = -(-updates // 4), 0.3 * rate
        metrics["grounder_loss"] = self.grounder.fit(
            replay, self.vocabulary, updates, args.grounder_batch, rate, self.pasting
        )
        replay.redescribe()
        self.standardise.fit(history(self.tensor(replay.feature_stacks())))
        if first:
            self.start_over(replay, number)
        return metrics

    def say_what_is_seen(self, enough: bool) -> None:
        said = f"named things: {', '.join(self.vocabulary.names)}"
        if not self.sees_things:
            reason = "no annotation names what matters" if enough else f"under {self.args.grounder_frames} annotations"
            said = f"{reason} so far: seeing pixels, as drq_dqn does"
        if said != self.said:
            print(said, file=sys.stderr)
        self.said = said

    def start_over(self, replay: Replay, updates: int) -> None:
        """What learned from pixels cannot read things: it learns anew, with as many updates, though at most 2,000."""
        if not updates:
            return
        self.critic.apply(orthogonal)
        self.target.load_state_dict(self.critic.state_dict())
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for _ in range(min(updates, 2000)):
            self.learn(replay, updates)

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.encode(*next_seen)
            next_action = self.critic(next_z).argmax(1, keepdim=True)  # chosen by one, valued by the other
            td_target = reward + discount * self.target(next_z).gather(1, next_action)[:, 0]
        q = self.critic(self.encode(*seen)).gather(1, action[:, None])[:, 0]
        loss = F.smooth_l1_loss(q, td_target)
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean()}

    def optimize(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        parameters = optimizer.param_groups[0]["params"]
        loss.backward(inputs=parameters)
        nn.utils.clip_grad_norm_(parameters, self.args.max_gradient_norm)
        optimizer.step()


# ---- main ----


@one_line_errors
def main(args: Args) -> None:
    with Run(args, __file__) as run:
        agent = Agent(run.action_dim, args, run.device)
        replay = run.make_replay(args.n_step, args.discount, features=agent.features)
        replay.describe = agent.describe if args.semantic else None
        for turn in run.steps(agent, replay):
            epsilon = args.epsilon_at(turn.agent_step)
            run.send(run.random_action() if turn.random else agent.act(turn.observation, epsilon=epsilon))
            for number in turn.updates:  # while the workers step and render
                run.log({**agent.update(replay, number), "epsilon": torch.tensor(epsilon, device=run.device)})
            steps = run.receive()
            replay.add(clipped(steps) if args.clip_rewards else steps)


if __name__ == "__main__":
    main(tyro.cli(Args))
