"""Pictures laid over frames: where they come from, what is seen of them, and the agents that use them."""

import cv2
import numpy as np
import pytest
import torch

from agents import drq_sac, madi_sac, sgqn_sac, svea_sac
from semore_bench.overlays import Overlay, load_pictures
from tests.tiny_agents import CPU, SIZE, make_agent, make_replay
from wrappers.backends import textures
from wrappers.errors import UserError

AGENTS = {
    drq_sac: {"augmentation": "overlay"},
    svea_sac: {"augmentation": "overlay"},
    madi_sac: {},
    sgqn_sac: {},
}
"""agents that lay pictures over frames, and what it takes that they do"""


@pytest.fixture
def pictures(tmp_path):
    """A folder with a red, a green and a blue picture, in a folder of their own, a damaged one and something else."""
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for channel, name in enumerate(("blue.png", "more/green.jpg", "more/red.bmp")):
        picture = np.zeros((40, 60, 3), np.uint8)
        picture[:, 10:50, channel] = 255  # the middle square: white margins must go
        picture[:, :10] = picture[:, 50:] = 255
        cv2.imwrite(str(tmp_path / "pictures" / name), picture)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "pictures" / "cut off.png").write_bytes((tmp_path / "pictures" / "blue.png").read_bytes()[:30])
    return tmp_path / "pictures"


def test_pictures_are_found_cut_to_their_middle_and_drawn_by_the_seed(pictures):
    found = load_pictures(str(pictures), 16, 10, seed=1)
    assert found.shape == (3, 16, 16, 3)
    assert found.dtype == np.uint8
    colours = sorted(found.mean((1, 2)).round(-1).tolist())
    assert np.allclose(colours, [[0, 0, 255], [0, 255, 0], [255, 0, 0]], atol=6), "RGB, without the white margins"
    assert np.array_equal(found, load_pictures(str(pictures), 16, 10, seed=1))
    first = {int(load_pictures(str(pictures), 16, 1, seed)[0].mean((0, 1)).argmax()) for seed in range(9)}
    assert first == {0, 1, 2}


def test_each_sample_sees_one_picture_half_transparent_in_all_frames(pictures):
    overlay = Overlay(str(pictures), 16, 10, 1, CPU)
    rgb = torch.randint(0, 256, (60, 9, 16, 16), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    before = rgb.clone()
    seen = overlay(rgb)
    assert seen.dtype == torch.uint8
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rgb, before)
    laid = seen.float() - rgb.float() / 2  # half of the picture is left
    assert torch.allclose(laid[:, :3], laid[:, 3:6], atol=1.1), "one picture for all frames of a stack"
    assert torch.allclose(laid[:, :3], laid[:, 6:], atol=1.1)
    colours = {tuple(colour) for colour in (laid[:, :3].mean((2, 3)) / 127.5).round().int().tolist()}
    assert colours == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}


def test_pictures_are_moved_about(monkeypatch):
    ramp = np.arange(36, dtype=np.uint8)[:, None] * 2 + np.arange(36, dtype=np.uint8) * 4
    monkeypatch.setattr(textures, "pictures", lambda *_: np.repeat(ramp[None, ..., None], 3, -1))
    overlay = Overlay(None, 32, 1, 1, CPU)
    corners = {int(overlay(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0, 0, 0, 0]) for _ in range(300)}
    assert corners == {y + 2 * x for y in range(5) for x in range(5)}, "4 pixels are an eighth of 32"


def test_made_up_pictures_follow_the_seed_and_are_those_for_training(monkeypatch):
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def seen(seed):
        torch.manual_seed(0)
        return Overlay(None, 32, 1, seed, CPU)(black)

    assert torch.equal(seen(1), seen(1))
    assert not torch.equal(seen(1), seen(2))
    assert seen(1).float().std() > 1
    asked = []
    monkeypatch.setattr(
        textures, "pictures", lambda *given: (asked.append(given), np.zeros((1, 36, 36, 3), np.uint8))[1]
    )
    Overlay(None, 32, 2000, 7, CPU)
    assert asked == [(500, 36, 7, "train")], "at every start of a run: not too many"


@pytest.mark.parametrize("module", AGENTS)
def test_agents_train_with_pictures_and_checkpoints_do_not_hold_them(module, pictures, tmp_path):
    agent = make_agent(module, overlay_images=str(pictures), **AGENTS[module])
    replay = make_replay(tmp_path / "replay", flow=False, annotate=False)
    seen = []
    lay = agent.overlay
    agent.overlay = lambda rgb: (seen.append(rgb), lay(rgb))[1]
    assert all(torch.isfinite(value) for value in agent.update(replay, 0).values())
    assert len(seen) == (2 if module is drq_sac else 1)
    assert seen[0].shape == (8, 9, SIZE, SIZE)
    assert not [name for name in agent.state_dict() if "overlay" in name]


@pytest.mark.parametrize("module", [drq_sac, svea_sac])
def test_no_picture_is_read_where_none_is_asked_for(module):
    assert not hasattr(make_agent(module, overlay_images="/no/such/folder"), "overlay")


def test_drq_lays_other_pictures_over_next_frames(pictures, tmp_path):
    agent = make_agent(drq_sac, augmentation="overlay", overlay_images=str(pictures), shift=0)
    batch = make_replay(tmp_path / "replay", flow=False, annotate=False).sample(8)
    colours = []
    for seen, stored in zip(agent.augment(batch)[:2], (batch.rgb, batch.next_rgb), strict=True):
        plain = torch.from_numpy(stored).permute(0, 1, 4, 2, 3).flatten(1, 2)
        laid = seen.float() - plain // 2
        colours.append(laid[:, :3].mean((2, 3)).argmax(1))
        assert laid.min() >= 0
        assert laid[:, :3].mean((2, 3)).amax(1).min() > 110
    assert not torch.equal(*colours)


@pytest.mark.parametrize("module", AGENTS)
@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_without_pictures_is_refused_in_one_line(module, kind, tmp_path):
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("")
    elif kind == "empty":
        folder.mkdir()
        (folder / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=f"--overlay-images {folder}") as error:
        make_agent(module, overlay_images=str(folder), **AGENTS[module])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", AGENTS)
def test_a_limit_without_pictures_is_refused(module):
    with pytest.raises(UserError, match="--overlay-limit must be at least 1, got 0"):
        make_agent(module, overlay_limit=0, **AGENTS[module])
