"""DrQ-DQN: double DQN from pixels with random shifts, for discrete actions (Kostrikov et al. 2021, arXiv 2004.13649).

Shifting the frames of every sampled transition by up to four pixels keeps the Q function from overfitting its encoder;
beneath are double Q-learning, a dueling Q function and n-step returns, as in DrQ's Atari runs. Its diff is to be read
against `drq_sac.py`: a Q function per action, and no actor. It is the baseline of `semore_dqn.py`.

Differs from DrQ's Atari runs: colours and this project's encoder instead of grey frames and Nature DQN's; shifts alone,
no change of intensity; targets that follow slowly, instead of a copy after each update, and no target copy of the
encoder; frames are centred by the mean colour of the first batch, without which nothing is learned on CartPole's white
ground. As in all agents here, batch, random steps and replay are the preset's and the suite's; DrQ's are batches of 32
and 1,600 random steps, with `--action-repeat 4 --frame-stack 4`. Evaluation is greedy. Lost lives end what is summed
up, not the episode: returns are whole games'.

Logged: `critic_loss` (Huber), `q` (mean value of the batch) and `epsilon` (the share of random actions).
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.replay import Batch, Replay
from semore_bench.runs import Run, one_line_errors
from semore_bench.transitions import Step
from wrappers.errors import UserError


@dataclass
class Args(CommonArgs):
    """DrQ-DQN."""

    feature_dim: int = 50
    """dimension of the representation that actor and critics see"""
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
        """RGB alone."""
        return EnvConfig(
            image_size=self.image_size,
            action_repeat=self.action_repeat,
            flow=None,
            actions="discrete",
            sticky_actions=self.sticky_actions,
            life_loss=self.life_loss,
        )

    def resolve(self) -> None:
        super().resolve()
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
        self.critic = Critic(args.feature_dim, actions, args.hidden_dim, args.critic_layer_norm)
        self.apply(orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("colour", torch.full((3 * args.frame_stack, 1, 1), 0.5))  # of the first batch, on average
        self.to(device, memory_format=torch.channels_last)

        critic = [*self.encoder.parameters(), *self.project.parameters(), *self.critic.parameters()]
        self.optimizers = {
            "critic": torch.optim.Adam(critic, args.learning_rate, eps=args.adam_epsilon, fused=True),
        }
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def encode(self, rgb: Tensor) -> Tensor:
        """uint8 (B, 3k, H, W) -> z (B, feature_dim)."""
        return self.project(self.encoder(rgb.float().div_(255).sub_(self.colour)).permute(0, 2, 3, 1).flatten(1))

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False, epsilon: float = 0.0) -> np.ndarray:
        """Stacked observations of N environments -> actions (N,): the best ones, or random ones with `epsilon`."""
        z = self.encode(stack_channels(self.tensor(observation["rgb"])))
        best = self.critic(z).argmax(1).cpu()
        if deterministic:
            return best.numpy()
        explore, random = torch.rand(len(best)) < epsilon, torch.randint(self.actions, best.shape)
        return torch.where(explore, random, best).numpy()

    def update(self, replay: Replay, number: int) -> dict[str, Tensor]:
        """Update `number` (from 0) from the replay; returns what to log, as tensors."""
        batch = replay.sample(self.args.batch_size)
        if number == 0:  # on white or black ground, what matters would be little beside a large constant
            self.colour.copy_(mean_colour(self.tensor(batch.rgb)))
        loss, metrics = self.critic_loss(*self.augment(batch))
        self.optimize("critic", loss)
        for target, online in zip(self.target.parameters(), self.critic.parameters(), strict=True):
            target.data.lerp_(online.data, self.args.tau)
        return metrics

    def augment(self, batch: Batch) -> tuple[Tensor, ...]:
        size = 2, len(batch.reward), 2
        offset = torch.randint(-self.args.shift, self.args.shift + 1, size, dtype=torch.int32).to(self.device)
        rgb = random_shift(self.tensor(batch.rgb), offset[0])
        next_rgb = random_shift(self.tensor(batch.next_rgb), offset[1])
        return rgb, next_rgb, self.tensor(batch.action), self.tensor(batch.reward), self.tensor(batch.discount)

    def critic_loss(
        self, rgb: Tensor, next_rgb: Tensor, action: Tensor, reward: Tensor, discount: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            next_z = self.encode(next_rgb)
            next_action = self.critic(next_z).argmax(1, keepdim=True)  # chosen by one, valued by the other
            td_target = reward + discount * self.target(next_z).gather(1, next_action)[:, 0]
        q = self.critic(self.encode(rgb)).gather(1, action[:, None])[:, 0]
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
        replay = run.make_replay(args.n_step, args.discount)
        for turn in run.steps(agent, replay):
            epsilon = args.epsilon_at(turn.agent_step)
            run.send(run.random_action() if turn.random else agent.act(turn.observation, epsilon=epsilon))
            for number in turn.updates:  # while the workers step and render
                run.log({**agent.update(replay, number), "epsilon": torch.tensor(epsilon, device=run.device)})
            steps = run.receive()
            replay.add(clipped(steps) if args.clip_rewards else steps)


if __name__ == "__main__":
    main(tyro.cli(Args))
