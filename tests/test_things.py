"""Named things as numbers: moments against hand-made masks, vocabularies in any order, crops that keep their place."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from semore_bench.envs import EnvConfig, make_env
from semore_bench.replay import AnnotatedBatch
from semore_bench.things import (
    MOTION,
    STATIC,
    THINGS,
    Standardise,
    TrueThings,
    Vocabulary,
    history,
    history_size,
    moments,
    quarters,
)
from wrappers.backends.annotators import make_annotator
from wrappers.backends.scenes import DOMAINS
from wrappers.backends.simulation import find_simulation
from wrappers.backends.simulator import SimulatorAnnotator

SIZE = 64
Y, X = (torch.from_numpy(grid).float() for grid in np.mgrid[0:SIZE, 0:SIZE])


def ellipse(x: float, y: float, a: float = 9.0, b: float = 3.0, angle: float = 0.0) -> torch.Tensor:
    """A soft-edged ellipse, (1, 1, SIZE, SIZE): centre and half-axes in cells, angle in radians, clockwise."""
    dx, dy = X + 0.5 - x, Y + 0.5 - y
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return torch.sigmoid(4 * (1 - torch.hypot(along / a, across / b)) * b)[None, None]


def numbers(mask: torch.Tensor, flow: torch.Tensor | None = None, **kwargs) -> np.ndarray:
    return moments(mask, flow, **kwargs)[0, 0].numpy()


def cells(value: float) -> float:
    """A length in cells, in units of half the image."""
    return 2 * value / SIZE


def test_a_shift_moves_the_centroid_by_exactly_that_and_nothing_else():
    before, after = numbers(ellipse(24, 30)), numbers(ellipse(31, 25))
    change = after - before
    assert change[1:3] == pytest.approx([cells(7), cells(-5)], rel=3e-3)
    assert change[[0, 3, 4, 5]] == pytest.approx(0, abs=5e-4)


def test_a_turn_turns_the_second_moments_and_leaves_mass_and_place():
    before, after = (numbers(ellipse(32, 32, angle=angle)) for angle in (0.3, 0.3 + np.pi / 5))
    xx, xy, yy = before[3:6]
    c, s = np.cos(np.pi / 5), np.sin(np.pi / 5)
    turn = np.array([[c, -s], [s, c]])
    want = turn @ np.array([[xx, xy], [xy, yy]]) @ turn.T
    assert after[3:6] == pytest.approx([want[0, 0], want[0, 1], want[1, 1]], rel=0.02, abs=1e-3)
    assert after[:3] == pytest.approx(before[:3], rel=0.01, abs=1e-4)


def test_twice_the_size_is_four_times_the_mass_and_the_second_moments():
    small, large = numbers(ellipse(32, 32, 6, 4)), numbers(ellipse(32, 32, 12, 8))
    assert large[0] / small[0] == pytest.approx(4, rel=0.03)
    assert large[[3, 5]] / small[[3, 5]] == pytest.approx(4, rel=0.05)


def test_mass_is_in_widths_of_the_image():
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, 3, :] = 1
    assert numbers(mask)[0] == pytest.approx(1)


@pytest.mark.parametrize("with_flow", [True, False])
def test_an_absent_thing_gives_zeros_and_never_nan(with_flow):
    flow = torch.rand(1, 2, SIZE, SIZE) if with_flow else None
    assert not numbers(torch.zeros(1, 1, SIZE, SIZE), flow).any()


def test_mean_flow_and_its_affine_part_are_those_within_the_thing():
    """A thing that turns and stretches in a world that moves otherwise."""
    x0, y0, turn, stretch, shift = 20.0, 40.0, 0.05, 0.02, (0.3, -0.1)
    mask = ellipse(x0, y0)
    dx, dy = cells(X + 0.5 - x0), cells(Y + 0.5 - y0)
    own = torch.stack([shift[0] + stretch * dx - turn * dy, shift[1] + turn * dx + stretch * dy])[None]
    flow = torch.where(mask > 0.001, own, torch.full_like(own, -0.7))
    got = numbers(mask, flow)
    variance_x, _, variance_y = got[3:6] / 4
    assert got[6:8] / 4 == pytest.approx(shift, abs=2e-3)
    # mean of (x - cx) u = stretch var(x), of (x - cx) v = turn var(x), ...
    want = [stretch * variance_x, turn * variance_x, -turn * variance_y, stretch * variance_y]
    assert got[8:12] / 8 == pytest.approx(want, abs=5e-4)
    whole = numbers(mask, flow, whole=True)
    assert whole[6:8] / 4 == pytest.approx(flow.mean((0, 2, 3)).numpy(), abs=1e-4)
    assert whole[:6] == pytest.approx(got[:6])


def test_history_holds_places_last_change_and_motion_of_all_but_the_oldest_frame():
    frames = torch.rand(5, 3, THINGS * (STATIC + MOTION))
    rows = history(frames)
    assert rows.shape == (5, THINGS * history_size(3))
    static, motion = frames.unflatten(-1, (THINGS, STATIC + MOTION)).split([STATIC, MOTION], -1)
    want = torch.cat([static, static[:, 2:] - static[:, 1:2], motion[:, 1:]], 1).flatten(1)
    assert torch.equal(rows, want)
    other = frames.clone().unflatten(-1, (THINGS, STATIC + MOTION))
    other[:, 0, :, STATIC:] += 1  # the oldest frame's motion is not looked at
    assert torch.equal(history(other.flatten(2)), rows)


def test_standardised_values_have_mean_0_and_deviation_1_and_constants_are_not_blown_up():
    values = torch.randn(1000, 3) * torch.tensor([5.0, 0.1, 0.0]) + 2
    values[:, 2] += torch.randn(1000) * 1e-6
    standardise = Standardise(3, floor=1e-3)
    standardise.fit(values)
    got = standardise(values)
    assert got.mean(0).abs().max() < 1e-2
    assert got.std(0)[:2].numpy() == pytest.approx([1, 1], rel=0.02)
    assert got[:, 2].abs().max() < 0.01
    assert standardise(values + 1e6).max() == 5


def test_noise_of_what_hardly_moves_is_not_as_loud_as_what_moves():
    values = torch.randn(1000, 2) * torch.tensor([0.3, 0.004])  # a thing's way, and a grounder's error
    standardise = Standardise(2, floor=0.03)
    standardise.fit(values)
    moves, noise = standardise(values).std(0).tolist()
    assert 0.7 < moves < 1
    assert noise < 0.2


def names_of(*texts: str, dim: int = 16) -> dict[int, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {number: (text, unit(rng.normal(size=dim))) for number, text in enumerate(texts)}


def unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def annotations(*frames: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of names and their relevance, frame by frame, as the replay hands them out."""
    classes, importance = np.full((len(frames), 10), -1), np.zeros((len(frames), 10), np.float32)
    for row, frame in enumerate(frames):
        classes[row, : len(frame)], importance[row, : len(frame)] = list(frame), list(frame.values())
    return classes, importance


def test_the_vocabulary_is_ordered_by_weight_and_does_not_depend_on_the_order_of_arrival():
    names = names_of("cart", "pole", "floor", "fly")
    frames = [{0: 0.8, 1: 1.0, 2: 0.0}] * 30 + [{1: 1.0, 2: 0.0}] * 10 + [{3: 0.9}]
    first = Vocabulary()
    first.choose(*annotations(*frames), names)
    assert first.names == ("pole", "cart")  # the floor does not matter, the fly is too rare
    renumbered = {7 - number: value for number, value in names.items()}
    shuffled = [{7 - number: value for number, value in frame.items()} for frame in frames[::-1]]
    second = Vocabulary()
    second.choose(*annotations(*shuffled), renumbered)
    assert second.names == first.names


def test_synonyms_are_one_name_unless_a_frame_tells_them_apart():
    names = names_of("pole", "the pole", "left leg", "right leg", "sun")
    for number, base in ((1, 0), (3, 2)):
        names[number] = names[number][0], unit(names[base][1] + 0.02 * names[number][1])
    vocabulary = Vocabulary()
    vocabulary.choose(*annotations(*[{0: 1.0}] * 6, *[{1: 1.0}] * 5, *[{2: 0.5, 3: 0.4}] * 9), names)
    assert vocabulary.names == ("pole", "left leg", "right leg")
    classes, _ = annotations(*[{0: 1.0}] * 6, *[{1: 1.0}] * 5, *[{2: 0.5, 3: 0.4}] * 9)
    assert vocabulary.places(classes, names) == {0: 0, 1: 0, 2: 1, 3: 2, 4: -1}


def test_a_background_class_is_no_things_synonym_however_alike_a_text_model_finds_them():
    names = names_of("pole", "cart", "floor", "sky", "rod")
    common = 10 * names[0][1]
    names = {number: (name, unit(common + embedding)) for number, (name, embedding) in names.items()}
    frames = [{0: 1.0, 1: 0.8, 2: 0.0, 3: 0.0}] * 8 + [{4: 0.9, 1: 0.8, 2: 0.0, 3: 0.0}] * 3 + [{2: 0.0, 3: 0.0}] * 4
    classes, importance = annotations(*frames)
    vocabulary = Vocabulary()
    vocabulary.choose(classes, importance, names)
    assert vocabulary.names == ("pole", "cart")
    assert vocabulary.places(classes, names) == {0: 0, 1: 1, 2: -1, 3: -1, 4: 0}


def test_embedded_models_find_many_words_alike_and_yet_no_background_is_a_thing():
    annotator = make_annotator("embedded")
    for parts in {tuple(part.name for part in domain.parts) for variants in DOMAINS.values() for domain in variants}:
        words = parts[:THINGS] + tuple(annotator.background)
        names = dict(enumerate(zip(words, annotator.clip.encode_classes(words), strict=True)))
        relevance = {number: 1.0 if word in parts else 0.0 for number, word in enumerate(words)}
        classes, importance = annotations(*[relevance] * 4)
        vocabulary = Vocabulary()
        vocabulary.choose(classes, importance, names)
        assert set(vocabulary.names) == set(parts[:THINGS])
        places = vocabulary.places(classes, names)
        assert [places[number] == -1 for number in names] == [word not in parts for word in words], words


def test_at_most_so_many_names_and_none_where_nothing_matters():
    names = names_of(*(f"thing {i}" for i in range(20)), dim=64)
    vocabulary = Vocabulary()
    vocabulary.choose(*annotations(*[{i: 1 - 0.01 * i for i in range(k, k + 10)} for k in (0, 10)] * 5), names)
    assert vocabulary.names == tuple(f"thing {i}" for i in range(THINGS))
    nothing = Vocabulary()
    nothing.choose(*annotations({0: 0.0, 1: 0.0}), names)
    assert len(nothing) == 0
    assert nothing.places(np.zeros((0, 10), int), names) == dict.fromkeys(names, -1)
    empty = Vocabulary()
    empty.choose(*annotations({}, {}), {})
    assert len(empty) == 0


def test_a_vocabulary_survives_its_checkpoint(tmp_path):
    names = names_of("cart", "pole")
    vocabulary, again = Vocabulary(), Vocabulary()
    vocabulary.choose(*annotations({0: 0.8, 1: 1.0}), names)
    torch.save(vocabulary.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.names == vocabulary.names
    classes, _ = annotations({0: 0.8, 1: 1.0})
    assert again.places(classes, names) == vocabulary.places(classes, names) == {0: 1, 1: 0}


def batch_of(grid: int = 8, size: int = 16) -> AnnotatedBatch:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(3), (4, grid, grid)).transpose(0, 3, 1, 2).astype(np.float32)
    classes = np.full((4, 10), -1)
    classes[:, :3] = (5, 3, 9)
    classes[1, :3] = (9, 5, 4)  # 4 is a synonym of 3
    maps = np.concatenate([probabilities, np.zeros((4, 7, grid, grid), np.float32)], 1)
    return AnnotatedBatch(np.zeros((4, size, size, 3), np.uint8), maps, classes, np.zeros((4, 10), np.float32))


def test_targets_gather_shares_by_name_and_leave_the_rest_to_the_background():
    batch, places = batch_of(), {3: 0, 4: 0, 5: 2, 9: -1}
    shares, named = Vocabulary.targets(batch, places)
    assert np.allclose(shares.sum(1), 1, atol=1e-5)
    assert np.allclose(shares[0, 0], batch.patch_probabilities[0, 1])
    assert np.allclose(shares[0, 2], batch.patch_probabilities[0, 0])
    assert np.allclose(shares[0, -1], batch.patch_probabilities[0, 2])
    assert np.allclose(shares[1, 0], batch.patch_probabilities[1, 2])
    assert named[:, :3].tolist() == [[True, False, True]] * 4
    assert not named[:, 3:].any()


@pytest.mark.parametrize(("size", "grid"), [(16, 8), (84, 16), (64, 32)])
def test_quarters_cut_frame_and_map_at_the_same_place_and_prefer_what_is_named(size, grid):
    count = 300
    rgb = np.zeros((count, size, size, 3), np.uint8)
    rgb[..., 0], rgb[..., 1] = np.mgrid[0:size, 0:size] * (240 // size)
    shares = np.zeros((count, THINGS + 1, grid, grid), np.float32)
    shares[:, -1] = 1
    shares[:, 0, 0, 0], shares[:, -1, 0, 0] = 1, 0  # in the corner: in one quarter of nine
    shares[:, 1] = np.arange(grid)[:, None] / 1000  # tells the rows
    torch.manual_seed(0)
    cut, maps = quarters(rgb, shares, np.full(THINGS + 1, [1e-3] + [1e3] * THINGS))
    assert cut.shape == (count, size // 2, size // 2, 3)
    assert maps.shape == (count, THINGS + 1, grid // 2, grid // 2)
    row = np.rint(maps[:, 1, 0, 0] * 1000).astype(int)
    assert np.array_equal(cut[:, 0, 0, 0] // (240 // size), row * size // grid)
    assert set(row * 4 // grid) == {0, 1, 2}
    assert 0.68 < maps[:, 0].any((1, 2)).mean() < 0.86  # three in four, and a ninth of the others


@pytest.mark.parametrize(("size", "grid"), [(50, 16), (64, 6)])
def test_frames_that_have_no_quarters_stay_whole(size, grid):
    rgb, shares = np.zeros((2, size, size, 3), np.uint8), np.zeros((2, THINGS + 1, grid, grid), np.float32)
    assert quarters(rgb, shares, np.ones(THINGS + 1))[0] is rgb


def test_true_things_are_the_moments_of_the_simulators_maps():
    config = EnvConfig(image_size=64, action_repeat=8, true_things=True)
    env = make_env("dm_control/cartpole-balance-v0", config)
    observation, _ = env.reset(seed=3)
    assert isinstance(env, TrueThings)
    assert isinstance(env.observation_space["state"], spaces.Box)
    assert set(observation) == {"rgb", "flow", "state"}
    pole, cart = observation["state"].reshape(THINGS, -1)[:2]
    assert not observation["state"].reshape(THINGS, -1)[2:].any()
    dark = (np.abs(observation["rgb"].astype(int) - observation["rgb"][-1, -1]).sum(-1) > 60)[:40]
    assert abs(pole[1] - cart[1]) < 0.15  # balanced over the cart
    assert pole[2] < cart[2]  # y points down
    assert dark.any()
    moved, *_ = env.step(np.ones(1, np.float32))
    cart_then = moved["state"].reshape(THINGS, -1)[1]
    assert (cart_then[1] - cart[1]) * 32 == pytest.approx(cart_then[6] / 4 * observation_bound(env), abs=1.0)
    env.close()


def test_true_things_are_as_exact_as_the_simulators_annotations():
    env = make_env("dm_control/cartpole-balance-v0", EnvConfig(image_size=64, true_things=True, flow=None))
    annotator = SimulatorAnnotator(grid=32)
    annotator.attach(env)
    observation, _ = env.reset(seed=3)
    simulation, places = find_simulation(env), []
    for number in range(24):
        [annotation] = annotator.annotate([observation["rgb"]], [0])
        maps = torch.from_numpy(annotation.patch_probabilities[:2].astype(np.float32))[None]
        state = observation["state"].reshape(THINGS, -1)
        np.testing.assert_allclose(state[:2], moments(maps, None)[0], atol=1e-5)
        places.append((simulation.data.qpos[0], 32 * state[1, 1]))
        observation, *_ = env.step(np.full(1, 1 if number < 12 else -1, np.float32))
    env.close()
    position, centre = np.array(places).T
    position, centre = (values[abs(position) < 1] for values in (position, centre))  # wholly in the picture
    slope, offset = np.polyfit(position, centre, 1)
    assert np.ptp(centre) > 3  # pixels
    assert abs(centre - slope * position - offset).max() < 0.25  # pixels: those of the observation would allow a half


def observation_bound(env) -> float:
    return float(env.observation_space["flow"].high.max())
