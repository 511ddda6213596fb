"""The replay against a plain list of what happened, on short episodes, several environments, and wrapped rings."""

import copy
import random
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import torch
from gymnasium import spaces
from hypothesis import example, given, settings
from hypothesis import strategies as st

from semore_bench.replay import Replay
from semore_bench.rundir import Damaged
from semore_bench.transitions import Step
from wrappers.backends.annotation import Annotation, SceneObject
from wrappers.errors import UserError

SIZE, GRID, DIM = 8, 2, 4
SPACE = spaces.Dict(
    {"rgb": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8), "flow": spaces.Box(1, 255, (SIZE, SIZE, 2), np.uint8)}
)


def frame(number: int) -> dict[str, np.ndarray]:
    """A frame that tells its number, in rgb (two digits to the base 256) and in flow."""
    rgb = np.zeros((SIZE, SIZE, 3), np.uint8)
    rgb[..., 0], rgb[..., 1] = number % 256, number // 256
    return {"rgb": rgb, "flow": np.full((SIZE, SIZE, 2), 128 + number % 100 - 50, np.uint8)}


def number_of(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., 0, 0, 0].astype(int) + 256 * rgb[..., 0, 0, 1].astype(int)


def flow_number_of(flow: np.ndarray) -> np.ndarray:
    return flow[..., 0, 0, 0].astype(int) - 128


def annotation(frame_step: int, text: str = "a cart", floors: int = 3) -> Annotation:
    unit = np.eye(DIM, dtype=np.float32)
    ball = np.full((GRID, GRID), frame_step % 10 / 10, np.float32)
    return Annotation(
        caption=text,
        objects=(SceneObject("ball", 0.5),),
        caption_embedding=unit[frame_step % DIM],
        class_names=("ball", f"floor {frame_step % floors}"),
        class_embeddings=unit[:2],
        patch_probabilities=np.stack([ball, 1 - ball]),
        relevance=0.5 * ball,
        frame_step=frame_step,
        source="test",
    )


class Player:
    """Plays episodes of given lengths into a replay and keeps what happened as plain lists."""

    def __init__(self, replay: Replay, lengths: list[int], terminated: list[bool], annotate: bool = False):
        self.replay, self.lengths, self.terminated, self.annotate = replay, lengths, terminated, annotate
        self.frames = 0
        self.transitions: dict[int, tuple] = {}  # first frame -> (episode's frames, index, rewards, terminated)
        self.episode: list[list[int]] = [[] for _ in range(replay.num_envs)]
        self.rewards: list[list[float]] = [[] for _ in range(replay.num_envs)]
        self.played = [0] * replay.num_envs
        self.frame_step = [-1] * replay.num_envs
        self.frame_steps: dict[int, int] = {}
        for env in range(replay.num_envs):
            replay.begin(env, *self._frame(env))

    def _frame(self, env: int):
        number, self.frames = self.frames, self.frames + 1
        self.episode[env].append(number)
        self.frame_step[env] += 1
        self.frame_steps[number] = self.frame_step[env]
        info = {}
        if self.annotate:
            info |= {"annotations": (annotation(self.frame_step[env], f"frame {number}"),), "annotation_ages": (0,)}
        return frame(number), info

    def step(self) -> None:
        steps = []
        for env in range(self.replay.num_envs):
            which = self.played[env] % len(self.lengths)
            before = self.episode[env][-1]
            reward = before * 0.25
            self.rewards[env].append(reward)
            observation, info = self._frame(env)
            ended = len(self.rewards[env]) == self.lengths[which]
            stops = ended and self.terminated[which]
            for index in range(len(self.rewards[env])):
                self.transitions[self.episode[env][index]] = (
                    self.episode[env], index, self.rewards[env], stops, ended,
                )  # fmt: skip
            following = None
            if ended:
                self.episode[env], self.rewards[env] = [], []
                self.played[env] += 1
                following = self._frame(env)
            action = np.full(2, before, np.float32)
            steps.append(Step(action, reward, stops, ended and not stops, observation, info, following))
        self.replay.add(steps)


def make(tmp_path, **kwargs) -> Replay:
    defaults = {"capacity": 50, "slack": 5, "frame_stack": 3, "discount": 0.9}
    return Replay(tmp_path, SPACE, 2, **{**defaults, **kwargs})


def check_batch(player: Player, n_step: int, stack: int, batch) -> set[int]:
    seen = set()
    for i, first in enumerate(batch.action[:, 0].astype(int)):
        frames, index, rewards, terminated, ended = player.transitions[first]
        end = min(index + n_step, len(rewards))
        assert end - index == n_step or ended, "an unfinished n-step return"
        want = [frames[max(0, index - back)] for back in reversed(range(stack))]
        want_next = [frames[max(0, end - back)] for back in reversed(range(stack))]
        assert number_of(batch.rgb[i]).tolist() == want
        assert number_of(batch.next_rgb[i]).tolist() == want_next
        assert flow_number_of(batch.flow[i]).tolist() == [n % 100 - 50 for n in want[1:]]
        assert flow_number_of(batch.next_flow[i]).tolist() == [n % 100 - 50 for n in want_next[1:]]
        value = sum(0.9**j * r for j, r in enumerate(rewards[index:end]))
        assert batch.reward[i] == pytest.approx(value, rel=1e-5)
        reached_end = ended and end == len(rewards)
        assert batch.discount[i] == pytest.approx(0 if terminated and reached_end else 0.9 ** (end - index), rel=1e-5)
        seen.add(first)
    return seen


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    terminated=st.lists(st.booleans(), min_size=4, max_size=4),
    n_step=st.integers(1, 4),
    stack=st.integers(1, 4),
    num_envs=st.integers(1, 3),
    steps=st.integers(5, 120),
)
def test_batches_equal_a_plain_list(tmp_path_factory, lengths, terminated, n_step, stack, num_envs, steps):
    replay = make(tmp_path_factory.mktemp("replay"), n_step=n_step, frame_stack=stack, num_envs=num_envs)
    player = Player(replay, lengths, terminated)
    for _ in range(steps):
        player.step()
    check_batch(player, n_step, stack, replay.sample(64))


def test_every_transition_of_the_window_is_drawn_and_no_older_one(tmp_path):
    replay = make(tmp_path, capacity=30)
    player = Player(replay, [7], [False])
    for _ in range(200):
        player.step()
    seen = set()
    for _ in range(20):
        seen |= check_batch(player, 1, 3, replay.sample(64))
    newest = player.frames - 1
    window = [n for n in player.transitions if newest - 30 <= n]
    assert seen == set(window)


def test_sampling_is_uniform(tmp_path):
    replay = make(tmp_path, num_envs=2, capacity=40)
    player = Player(replay, [5, 3], [False, True])
    for _ in range(30):
        player.step()
    counts = np.bincount(np.concatenate([replay.sample(500).action[:, 0].astype(int) for _ in range(40)]))
    counts = counts[counts > 0]
    expected = counts.sum() / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 2 * len(counts), "chi-square far above its mean"


def test_latest_stack_repeats_the_first_frame_and_never_crosses_an_episode(tmp_path):
    replay = make(tmp_path)
    player = Player(replay, [4], [False])
    for _ in range(23):
        frames = player.episode[0]
        want = [frames[max(0, len(frames) - 1 - back)] for back in (2, 1, 0)]
        assert number_of(replay.latest()["rgb"][0]).tolist() == want
        assert flow_number_of(replay.latest()["flow"][0]).tolist() == [n % 100 - 50 for n in want[1:]]
        player.step()


def test_annotations_reach_their_frames_however_late(tmp_path):
    replay = make(tmp_path, annotate_every=1, grid=GRID, embedding_dim=DIM, capacity=40)
    player = Player(replay, [6], [False])
    for _ in range(25):
        player.step()
    for number in (24, 3, 11, 0):  # also of episodes that are over
        assert replay.attach(0, annotation(number, f"frame {number}"), age=player.frames - 1 - number)
    batch = replay.sample_annotated(100)
    assert {int(n) for n in number_of(batch.rgb)} == {24, 3, 11, 0}
    for i, number in enumerate(number_of(batch.rgb)):
        want = annotation(int(number))
        assert np.allclose(batch.patch_probabilities[i, :2], want.patch_probabilities, atol=1 / 500)
        assert not batch.patch_probabilities[i, 2:].any()
        assert (batch.classes[i] >= 0).tolist() == [True, True] + [False] * 8
        assert batch.importance[i].tolist() == [0.5] + [0.0] * 9
        for place in (0, 1):
            name, embedding = replay.names[int(batch.classes[i, place])]
            assert name == want.class_names[place]
            assert np.array_equal(embedding, want.class_embeddings[place])
    classes, importance = replay.named()
    assert {replay.names[int(number)][0] for number in classes[importance > 0]} == {"ball"}
    assert len(classes) == 4


def test_annotations_of_forgotten_or_unknown_frames_are_dropped_and_counted(tmp_path):
    replay = make(tmp_path, annotate_every=1, grid=GRID, embedding_dim=DIM, capacity=10)
    player = Player(replay, [6], [False])
    for _ in range(60):
        player.step()
    assert not replay.attach(0, annotation(2), age=player.frames - 3)
    assert not replay.attach(0, annotation(2), age=-1)
    assert replay.annotations_dropped == 2
    assert replay.sample_annotated(4) is None


def test_annotated_samples_stay_inside_the_window_while_the_rings_wrap(tmp_path):
    replay = make(tmp_path, annotate_every=2, grid=GRID, embedding_dim=DIM, capacity=20, num_envs=2)
    player = Player(replay, [6, 2], [False, True], annotate=True)  # more annotations than the store was sized for
    for step in range(150):
        player.step()
        if step > 3:
            batch = replay.sample_annotated(16)
            numbers = number_of(batch.rgb)
            assert numbers.min() >= player.frames - 2 * 40
            balls = batch.patch_probabilities[:, 0, 0, 0]
            assert np.allclose(balls, [player.frame_steps[n] % 10 / 10 for n in numbers], atol=1 / 500)


def test_names_that_no_annotation_uses_are_forgotten_and_numbers_keep_their_meaning(tmp_path):
    replay = make(tmp_path, annotate_every=1, grid=GRID, embedding_dim=DIM, capacity=10)
    player = Player(replay, [9], [False])
    limit = 2 * 10 * replay.annotation_window
    for step in range(2 * limit):
        player.step()
        assert replay.attach(0, annotation(step, floors=10**9), age=0)
        if step % 100 == 50:
            batch = replay.sample_annotated(8)
            for row, ball in zip(batch.classes, batch.patch_probabilities[:, 0, 0, 0], strict=True):
                assert replay.names[int(row[0])][0] == "ball"
                floor = replay.names[int(row[1])][0]
                assert int(floor.removeprefix("floor ")) % 10 == round(10 * ball)
    assert len(replay.names) <= limit + 1


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), n_step=st.integers(1, 3), num_envs=st.integers(1, 2)
)
def test_features_are_those_of_the_stacked_frames_also_when_computed_anew(tmp_path_factory, lengths, n_step, num_envs):
    replay = make(tmp_path_factory.mktemp("replay"), n_step=n_step, num_envs=num_envs, capacity=40, features=2)
    factor = 1.0

    def describe(rgb, flow):
        return np.stack([number_of(rgb), factor * flow_number_of(flow)], 1).astype(np.float32)

    replay.describe = describe
    player = Player(replay, lengths, [False] * len(lengths))
    for round in range(2):
        for _ in range(60):
            player.step()
        if round:
            factor = 2.0
            replay.redescribe()
        batch = replay.sample(32)
        for rgb, flow, features in (
            (batch.rgb, batch.flow, batch.features),
            (batch.next_rgb, batch.next_flow, batch.next_features),
            [replay.latest()[name] for name in ("rgb", "flow", "features")],
        ):
            assert np.array_equal(features[..., 0], number_of(rgb))
            assert np.array_equal(features[:, 1:, 1], factor * flow_number_of(flow))
        stacks = replay.feature_stacks()
        assert len(stacks) == min(player.frames // num_envs, replay.window) * num_envs or num_envs > 1
        assert (np.diff(stacks[..., 0], axis=1) >= 0).all()
        assert len(replay.feature_stacks(limit=10)) <= 10 + num_envs


def test_states_are_kept_as_features_without_frames(tmp_path):
    replay = Replay(tmp_path, spaces.Dict({"state": spaces.Box(-9, 9, (3,), np.float32)}), 1, capacity=20, n_step=2)
    replay.begin(0, {"state": np.zeros(3, np.float32)}, {})
    for number in range(1, 15):
        state = {"state": np.full(3, number, np.float32)}
        replay.add([Step(np.zeros(1, np.float32), 1.0, False, False, state, {}, None)])
    batch = replay.sample(16)
    assert batch.rgb is None
    assert np.array_equal(batch.next_features[:, -1], batch.features[:, -1] + 2)
    assert replay.latest()["features"][0, :, 0].tolist() == [12, 13, 14]
    assert replay.difference(0, {"state": np.full(3, 14.5, np.float32)}) == pytest.approx(0.5)


@pytest.mark.parametrize("n_step", [1, 3])
def test_returning_to_a_checkpoint_gives_the_same_batches(tmp_path, n_step):
    """The process goes on writing after its checkpoint, dies, and another one takes over the files."""
    kwargs = {"n_step": n_step, "annotate_every": 2, "grid": GRID, "embedding_dim": DIM, "capacity": 30, "slack": 40}
    kwargs["features"] = 1
    replay = make(tmp_path / "a", **kwargs)
    replay.describe = lambda rgb, flow: number_of(rgb)[:, None]
    player = Player(replay, [6, 4], [False, True], annotate=True)
    for _ in range(100):
        player.step()
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    def future(replay):
        parts = vars(replay.sample(32)), vars(replay.sample_annotated(8)), replay.latest()
        return [array for part in parts for array in part.values()]

    want, replay_describe = future(replay), replay.describe
    for _ in range(35):
        player.step()
    replay.describe = lambda rgb, flow: 0 * number_of(rgb)[:, None]
    replay.redescribe()  # as if the grounder had learned in the meantime
    del replay
    again = make(tmp_path / "a", **kwargs)
    again.describe = replay_describe
    again.load_state_dict(state)
    for got, expected in zip(future(again), want, strict=True):
        assert np.array_equal(got, expected)


class LatePlayer(Player):
    """Every `every`-th frame of an episode is annotated, `delay` frames later, be its episode over or not."""

    def __init__(self, replay: Replay, lengths: list[int], terminated: list[bool], every: int, delay: int):
        self.every, self.delay = every, delay
        self.shown = [0] * replay.num_envs
        self.under_way: list[list[tuple[int, Annotation]]] = [[] for _ in range(replay.num_envs)]
        super().__init__(replay, lengths, terminated)

    def _frame(self, env: int):
        observation, info = super()._frame(env)
        now, self.shown[env] = self.shown[env], self.shown[env] + 1
        first = len(self.episode[env]) == 1
        if first:
            self.frame_step[env] = 0
        if self.frame_step[env] % self.every == 0:
            self.under_way[env].append((now, annotation(self.frame_step[env])))
        done = [pair for pair in self.under_way[env] if now - pair[0] >= self.delay]
        self.under_way[env] = [pair for pair in self.under_way[env] if now - pair[0] < self.delay]
        info["annotations"] = tuple(said for _, said in done)
        info["annotation_ages"] = tuple(now - when for when, _ in done)
        return observation, info

    def copied(self, replay: Replay | None) -> "LatePlayer":
        """As it is now, playing into another replay."""
        other = copy.copy(self)
        vars(other).update(copy.deepcopy({name: value for name, value in vars(self).items() if name != "replay"}))
        other.replay = replay
        return other

    def turn(self) -> list[np.ndarray]:
        """What a learner that draws in every turn gets to see."""
        self.step()
        batches = self.replay.sample(8), self.replay.sample_annotated(8)
        seen = [vars(batch) for batch in batches if batch is not None] + [self.replay.latest()]
        return [array for part in seen for array in part.values() if array is not None]


def stored(replay: Replay, folder) -> dict:
    torch.save(replay.state_dict(), folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    capacity=st.integers(4, 60),
    num_envs=st.integers(1, 3),
    every=st.integers(1, 4),
    delay=st.integers(0, 20),
    before=st.integers(3, 250),
    slack=st.integers(1, 12),
)
@example(lengths=[9], capacity=10, num_envs=1, every=1, delay=7, before=250, slack=12)  # all rings have wrapped
@example(lengths=[1, 2], capacity=40, num_envs=2, every=3, delay=0, before=50, slack=9)
def test_either_checkpoint_continues_exactly(
    tmp_path_factory, lengths, capacity, num_envs, every, delay, before, slack
):
    """A process goes on writing for as long as it may after its two checkpoints, and dies; others take over its files,
    from the newest checkpoint and then, because that is damaged, from the one before: short episodes, late annotations,
    and rings that wrap or are shorter than an episode."""
    with patch("semore_bench.replay._ANNOTATIONS_PER_STEP", 2):  # as few rows to spare as may be
        folder = tmp_path_factory.mktemp("replay")
        play_killed(
            folder,
            lengths,
            every,
            delay,
            before,
            annotate_every=every,
            capacity=capacity,
            slack=slack,
            num_envs=num_envs,
        )


def play_killed(folder, lengths: list[int], every: int, delay: int, before: int, **kwargs) -> None:
    kwargs |= {"grid": GRID, "embedding_dim": DIM}
    replay = make(folder, **kwargs)
    player = LatePlayer(replay, lengths, [False, True, True], every, delay)
    for _ in range(before):
        player.turn()
    checkpoints, seen = [(stored(replay, folder), player.copied(None), 0)], []
    while True:
        if replay.checkpoint_due:
            if len(checkpoints) == 2:
                break
            checkpoints.append((stored(replay, folder), player.copied(None), len(seen)))
        seen.append(player.turn())
    for state, then, turn in reversed(checkpoints):
        again = make(folder, **kwargs)
        again.load_state_dict(state)
        resumed = then.copied(again)
        for want in seen[turn:]:
            if again.checkpoint_due:
                again.state_dict()
            for got, expected in zip(resumed.turn(), want, strict=True):
                assert np.array_equal(got, expected)


@pytest.mark.parametrize("annotate_every", [0, 1, 8])
def test_a_checkpoint_is_due_after_as_many_frames_as_were_promised(tmp_path, annotate_every):
    replay = make(tmp_path, annotate_every=annotate_every, grid=GRID, embedding_dim=DIM, slack=30)
    player = LatePlayer(replay, [9], [False], annotate_every, 0) if annotate_every else Player(replay, [9], [False])
    assert not replay.checkpoint_due, "there is none that could lose anything"
    for _ in range(3):
        replay.state_dict()
        for _ in range(26):  # and 3 last frames of episodes
            assert not replay.checkpoint_due
            player.step()
        for _ in range(6):
            player.step()
        assert replay.checkpoint_due


@pytest.mark.parametrize("name", "rgb flow action reward follows episode_step owner probabilities".split())
@pytest.mark.parametrize("harm", ["missing", "shorter", "longer", "random", "one bit"])
def test_a_file_that_is_not_as_it_was_is_named(tmp_path, name, harm):
    kwargs = {"annotate_every": 2, "grid": GRID, "embedding_dim": DIM}
    replay = make(tmp_path, **kwargs)
    player = LatePlayer(replay, [6], [False], 2, 0)
    for _ in range(30):
        player.turn()
    state = replay.state_dict()
    path = tmp_path / f"{name}.bin"
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "one bit":
        row = replay._arrays[name][0].nbytes
        content[3 * row] ^= 1
        path.write_bytes(content)
    else:
        noise = random.Random(0).randbytes(len(content))
        damaged = {"shorter": content[:10], "longer": b"x" + content, "random": noise}
        path.write_bytes(damaged[harm])
    with pytest.raises(Damaged, match=rf"{name}\.bin (was missing|had another size|has been changed)"):
        make(tmp_path, **kwargs).load_state_dict(state)


def test_actions_of_the_running_episode(tmp_path):
    replay = make(tmp_path)
    player = Player(replay, [9], [False])
    for _ in range(30):
        player.step()
    assert [action[0] for action in replay.episode_actions[0]] == [float(n) for n in player.episode[0][:-1]]


def test_bytes_per_transition(tmp_path):
    space = spaces.Dict(
        {"rgb": spaces.Box(0, 255, (84, 84, 3), np.uint8), "flow": spaces.Box(1, 255, (84, 84, 2), np.uint8)}
    )
    plain = spaces.Dict({"rgb": space["rgb"]})
    kwargs = {"capacity": 5000, "slack": 0, "annotate_every": 8, "grid": 16}
    with_flow = Replay(tmp_path / "flow", space, 6, **kwargs)
    without = Replay(tmp_path / "plain", plain, 6, **kwargs)
    assert with_flow.nbytes / with_flow.slots < 36_000
    assert without.nbytes / without.slots < 21_800


def test_a_disk_that_is_too_small_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="bytes on disk.*1,000 are available.*--replay-capacity"):
        make(tmp_path)


def test_an_empty_replay_says_so(tmp_path):
    replay = make(tmp_path, n_step=3)
    with pytest.raises(ValueError, match="no complete transition"):
        replay.sample(4)
    player = Player(replay, [9], [False])
    player.step()  # one step of an n-step return of three
    with pytest.raises(ValueError, match="no complete transition"):
        replay.sample(4)
