"""Composed frames show what they are given, whatever the texts, and videos decode to what was written."""

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semore_bench import videos
from semore_bench.videos import GAP, TITLE_HEIGHT, VideoWriter, compose_frame, wrap, write_video
from wrappers.flow import flow_to_rgb

SIZE = 96


def solid(colour: tuple[int, int, int], height: int = 84, width: int = 84) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def panel(picture: np.ndarray, index: int) -> np.ndarray:
    left = GAP + index * (SIZE + GAP)
    return picture[TITLE_HEIGHT : TITLE_HEIGHT + SIZE, left : left + SIZE]


def decode(path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_panels_show_frame_flow_and_relevance():
    flow = np.zeros((84, 84, 2), np.float32)
    flow[:, 42:, 0] = 4  # the right half moves to the right
    relevance = np.zeros((4, 4), np.float32)
    relevance[:2] = 1
    picture = compose_frame(solid((200, 40, 40)), flow, relevance, size=SIZE)

    np.testing.assert_array_equal(panel(picture, 0), solid((200, 40, 40), SIZE, SIZE))
    colours = flow_to_rgb(flow, 8.0)
    np.testing.assert_array_equal(panel(picture, 1)[10, 10], colours[0, 0])
    np.testing.assert_array_equal(panel(picture, 1)[10, -10], colours[0, -1])
    assert (colours[0, 0] != colours[0, -1]).any()
    relevant, irrelevant = panel(picture, 2)[5, 5].astype(int), panel(picture, 2)[-5, 5].astype(int)
    assert relevant.sum() > irrelevant.sum() + 150
    assert irrelevant[2] > irrelevant[1]  # violet, where relevance is 0
    assert relevant[1] > relevant[2]  # yellow, where it is 1


def test_named_things_are_outlined_and_named_where_they_are():
    maps = np.zeros((32, 32), np.float32)
    maps[8:16, 8:16] = 0.9
    things = [("ball", maps), ("ghost", np.zeros((32, 32), np.float32))]
    plain = compose_frame(solid((100, 100, 100)), things=[("ghost", things[1][1])], size=SIZE)
    picture = compose_frame(solid((100, 100, 100)), things=things, size=SIZE)
    assert picture.shape == plain.shape
    changed = np.argwhere((panel(picture, 1) != panel(plain, 1)).any(-1))
    inside = panel(picture, 1)[30:45, 30:45].reshape(-1, 3).mean(0)
    assert inside[2] > inside[0] + 50, "the first thing is blue"
    assert changed.min() > 5, "what is far from the thing and its name stays"
    assert changed[:, 0].max() < 55
    unnamed = compose_frame(solid((100, 100, 100)), things=[("", maps)], size=SIZE)
    assert (panel(unnamed, 1) != panel(picture, 1)).any(), "the name is written"


@given(st.lists(st.text(max_size=300), max_size=10))
@settings(max_examples=20, deadline=None)
def test_any_names_and_maps_can_be_drawn(names):
    rng = np.random.default_rng(0)
    maps = rng.uniform(-1, 2, (len(names), 5, 7)).astype(np.float32)
    maps[::2, 0, 0] = np.nan
    things = list(zip(names, maps, strict=True))
    assert (
        compose_frame(solid((0, 0, 0)), things=things, size=SIZE).shape
        == compose_frame(solid((0, 0, 0)), things=[], size=SIZE).shape
    )


def test_relevance_is_drawn_over_the_frame():
    frame = solid((0, 0, 0))
    frame[:, 42:] = 255
    picture = panel(compose_frame(frame, relevance=np.full((6, 6), 0.5), size=SIZE), 1)
    assert picture[40, 80].min() > picture[40, 10].min() + 80


def test_without_captions_no_room_is_left_for_them():
    rgb = solid((0, 0, 0))
    assert len(compose_frame(rgb, size=SIZE)) < len(compose_frame(rgb, caption="", size=SIZE))


def test_the_frame_is_not_smoothed():
    frame = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
    picture = panel(compose_frame(frame, size=SIZE), 0)
    np.testing.assert_array_equal(picture, frame.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("shape", [(84, 84), (64, 64), (60, 100), (101, 33), (1, 1)])
@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("size", [64, 255])
def test_height_and_width_are_even_for_every_shape(shape, vertical, size):
    picture = compose_frame(solid((1, 2, 3), *shape), np.zeros((*shape, 2), np.float32), size=size, vertical=vertical)
    assert picture.dtype == np.uint8
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0


def test_inputs_are_left_as_they_were():
    rgb, flow, relevance = solid((9, 9, 9), SIZE, SIZE), np.ones((SIZE, SIZE, 2), np.float32), np.ones((4, 4))
    copies = rgb.copy(), flow.copy(), relevance.copy()
    compose_frame(rgb, flow, relevance, "caption", size=SIZE)
    for array, copy in zip((rgb, flow, relevance), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@settings(max_examples=40, deadline=None)
@given(caption=st.text(max_size=400), footer=st.text(max_size=400), vertical=st.booleans())
def test_no_text_changes_the_layout(caption, footer, vertical):
    rgb = solid((10, 200, 30))
    plain = compose_frame(rgb, caption="", size=SIZE, vertical=vertical)
    picture = compose_frame(rgb, caption=caption, footer=footer, size=SIZE, vertical=vertical)
    assert picture.shape == plain.shape
    below = TITLE_HEIGHT + SIZE + GAP
    np.testing.assert_array_equal(picture[: below - GAP], plain[: below - GAP])
    np.testing.assert_array_equal(picture[:, :3], plain[:, :3])  # the margins stay empty
    np.testing.assert_array_equal(picture[:, -3:], plain[:, -3:])


@pytest.mark.parametrize("caption", ["a pole", "\ud800\x00\x1b[31m\u202e", "機器人 🤖 ربوت"])
def test_captions_are_visible(caption):
    with_caption, without = (compose_frame(solid((0, 0, 0)), caption=text, size=SIZE) for text in (caption, ""))
    assert (with_caption != without).any()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200), width=st.integers(40, 400), lines=st.integers(1, 4))
def test_wrapped_lines_fit(text, width, lines):
    font = videos.font(14)
    wrapped = wrap(text, font, width, lines)
    assert len(wrapped) <= lines
    assert all(font.getlength(line) <= width for line in wrapped)


def test_wrapping_keeps_every_word_or_says_that_it_does_not():
    font = videos.font(14)
    text = "a robot  hand\npushes the red block to the left"
    words = text.split()
    assert wrap(text, font, 1000, 1) == [" ".join(words)]
    complete = wrap(text, font, 120, 9)
    assert len(complete) > 2
    assert " ".join(complete).split() == words
    cut = wrap(text, font, 120, 2)
    assert cut[0] == complete[0]
    assert cut[1].endswith("…")
    assert cut[1][:-1].strip() in complete[1]
    assert wrap("", font, 100, 2) == []
    (long,) = wrap("x" * 300, font, 100, 3)
    assert long.startswith("xxx")
    assert long.endswith("…")


def test_a_video_decodes_to_what_was_written(tmp_path):
    colours = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]
    flow = np.zeros((84, 84, 2), np.float32)
    frames = [compose_frame(solid(colour), flow, caption="moving", size=SIZE) for colour in colours]
    path = write_video(tmp_path / "new" / "folder" / "video.mp4", frames, fps=10)
    decoded = decode(path)
    assert decoded.shape == (3, *frames[0].shape)
    for index, colour in enumerate(colours):
        shown = panel(decoded[index], 0)[8:-8, 8:-8].reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(shown, colour, atol=8)
        assert np.abs(decoded[index].astype(int) - frames[index]).mean() < 4
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 10
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_an_interrupted_video_leaves_the_old_one_and_nothing_else(tmp_path):
    path = write_video(tmp_path / "video.mp4", [solid((200, 0, 0))])
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), VideoWriter(path) as video:  # noqa: PT012
        video.add(solid((0, 200, 0)))
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_video_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path) as video:
        video.add(solid((0, 200, 0)))
        assert not path.exists()
    assert path.exists()


@pytest.mark.parametrize(
    "frame",
    [solid((0, 0, 0), 10, 12), solid((0, 0, 0), 12, 10).astype(np.float32), np.zeros((12, 10), np.uint8)],
)
def test_frames_unlike_the_first_are_refused(tmp_path, frame):
    with pytest.raises(ValueError, match=r"expected a uint8 frame of shape \(12, 10, 3\)"):
        write_video(tmp_path / "video.mp4", [solid((0, 0, 0), 12, 10), frame])
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even height and width, got 11 x 10"):
        write_video(tmp_path / "video.mp4", [solid((0, 0, 0), 11, 10)])


def test_no_frames_no_file(tmp_path):
    write_video(tmp_path / "video.mp4", [])
    assert list(tmp_path.iterdir()) == []
