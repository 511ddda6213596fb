"""What pasting changes in annotated frames, and what it leaves alone."""

import numpy as np
import pytest
import torch

from semore_bench import pasting
from semore_bench.pasting import Pasting
from semore_bench.things import THINGS
from tests.tiny_agents import GRID, make_semore
from wrappers.errors import UserError

SIZE, COUNT = 32, 64


def frames() -> tuple[np.ndarray, np.ndarray]:
    """Random frames with a thing in their left upper quarter, of a grid of 8 patches a side."""
    rgb = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)
    shares = np.zeros((COUNT, THINGS + 1, 8, 8), np.float32)
    shares[:, 2, :4, :4] = 1
    shares[:, -1] = 1 - shares.sum(1)
    return rgb, shares


def changed(seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    return Pasting(None, SIZE, 10, seed=1)(*frames())


@pytest.fixture
def only(monkeypatch):
    """Sets in which share of the frames something is done."""

    def set_shares(pasted: float = 0, recoloured: float = 0, overlaid: float = 0) -> None:
        for name, share in (("PASTED", pasted), ("RECOLOURED", recoloured), ("OVERLAID", overlaid)):
            monkeypatch.setattr(pasting, name, share)

    return set_shares


def test_pytorchs_seed_determines_everything():
    first = changed()
    assert (first.shape, first.dtype) == ((COUNT, SIZE, SIZE, 3), np.uint8)
    assert np.array_equal(first, changed())
    assert not np.array_equal(first, changed(1))


def test_some_frames_stay_as_they_are():
    same = (changed() == frames()[0]).all((1, 2, 3))
    untouched = (1 - pasting.PASTED) * (1 - pasting.RECOLOURED) * (1 - pasting.OVERLAID)
    assert 0 < same.mean() < 3 * untouched


def test_what_is_named_is_pasted_onto_pictures(only):
    only(pasted=1)
    rgb, _ = frames()
    after = changed()
    assert np.array_equal(after[:, :12, :12], rgb[:, :12, :12]), "the thing, but for its border"
    found = torch.from_numpy(after[:, 20:, 20:]).permute(0, 3, 1, 2).contiguous()
    pictures = Pasting(None, SIZE, 10, seed=1)._pictures.unfold(2, 12, 1).unfold(3, 12, 1)
    pieces = {piece.tobytes() for piece in pictures.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous().numpy()}
    assert all(piece.tobytes() in pieces for piece in found.numpy()), "everything else is a piece of a picture"


def test_things_and_background_take_colours_of_their_own(only):
    only(recoloured=1)
    rgb = np.full((COUNT, SIZE, SIZE, 3), 128, np.uint8)
    torch.manual_seed(0)
    after = Pasting(None, SIZE, 10, seed=1)(rgb, frames()[1]).astype(int)
    inside, outside = after[:, :12, :12], after[:, 20:, 20:]
    for part in (inside, outside):
        assert (part == part[:, :1, :1]).all(), "one colour"
    assert (np.abs(inside[:, 0, 0] - outside[:, 0, 0]).max(1) > 10).mean() > 0.8


def test_pictures_are_laid_over_but_never_hide_what_was_there(only):
    only(overlaid=1)
    rgb = frames()[0].astype(float)
    after = changed().astype(float)
    likeness = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(rgb, after, strict=True)]
    assert min(likeness) > 0.5
    assert np.median(likeness) < 0.999


def test_a_grounder_that_is_trained_so_still_finds_what_was_named(tmp_path):
    agent, replay = make_semore(tmp_path, grounder_updates=250, grounder_batch=16, grounder_pasting=True)
    batch = replay.sample_annotated(32)
    maps = agent.grounder.maps(batch.rgb, agent.vocabulary)[:, :1]
    shares = torch.nn.functional.adaptive_avg_pool2d(maps, GRID).numpy()
    true = batch.patch_probabilities[:, :1]
    assert np.minimum(shares, true).sum() / np.maximum(shares, true).sum() > 0.4


def test_mistakes():
    with pytest.raises(UserError, match="--overlay-limit must be at least 1"):
        Pasting(None, SIZE, 0, 1)
    with pytest.raises(UserError, match="no folder"):
        Pasting("/nowhere", SIZE, 1, 1)
