"""What an agent sees as pictures: frame, optical flow, relevance and named things side by side, and videos of them."""

import functools
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from wrappers.flow import flow_to_rgb

BACKGROUND, TEXT, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
THING_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#bbbbbb")
SEEN = 0.3  # probability from which on a thing is outlined
GAP, MARGIN = 4, 8  # pixels between panels, and around text
TITLE_SIZE, CAPTION_SIZE = 13, 14  # font sizes in pixels
TITLE_HEIGHT, LINE_HEIGHT = 22, 20


def compose_frame(
    rgb: np.ndarray,
    flow: np.ndarray | None = None,
    relevance: np.ndarray | None = None,
    caption: str | None = None,
    things: Sequence[tuple[str, np.ndarray]] | None = None,
    flow_bound: float = 8.0,
    size: int = 256,
    footer: str = "",
    vertical: bool = False,
) -> np.ndarray:
    """Draws one observation: panels, below them the caption (two lines, six if vertical) and a footer.

    The size of the result depends on the panels, never on the texts: what does not fit ends in an ellipsis.

    Args:
        rgb: uint8 (H, W, 3).
        flow: float32 (H, W, 2), pixels per agent step; drawn as hue for direction, saturation for speed.
        relevance: float32 (G, G) in 0–1; drawn over the grey frame, dark violet for 0 to yellow for 1.
        caption: any text; None leaves no room for captions.
        things: names and class maps, float32 (h, w) in 0–1; drawn over the grey frame, outlined, with the name.
        flow_bound: pixels per agent step that are drawn fully saturated.
        size: height of a panel in pixels.
        footer: any text, in one line.
        vertical: panels below one another, for a strip of several moments.

    Returns:
        uint8 (h, w, 3) with even h and w, as H.264 needs.
    """
    height, width = size, max(1, round(size * rgb.shape[1] / rgb.shape[0]))
    scaled_rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_NEAREST)
    panels = {"frame": scaled_rgb}
    if flow is not None:
        picture = cv2.resize(flow_to_rgb(flow, flow_bound), (width, height), interpolation=cv2.INTER_NEAREST)
        panels["optical flow"] = _with_colour_wheel(picture)
    if relevance is not None:
        panels["relevance"] = _heat_map(scaled_rgb, relevance)
    if things is not None:
        panels["named things"] = _outlines(scaled_rgb, things)

    rows, columns = (len(panels), 1) if vertical else (1, len(panels))
    lines = 0 if caption is None else 6 if vertical else 2
    panels_height = rows * (TITLE_HEIGHT + height + GAP)
    total_width = columns * (width + GAP) + GAP
    total_height = panels_height + (lines + 1) * LINE_HEIGHT + MARGIN
    canvas = Image.new("RGB", (_even(total_width), _even(total_height)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    for index, (title, panel) in enumerate(panels.items()):
        row, column = (index, 0) if vertical else (0, index)
        x, y = GAP + column * (width + GAP), row * (TITLE_HEIGHT + height + GAP)
        (title,) = wrap(title, font(TITLE_SIZE), width - MARGIN, lines=1)
        draw.text((x + GAP, y + TITLE_HEIGHT // 2), title, FAINT, font(TITLE_SIZE), anchor="lm")
        canvas.paste(Image.fromarray(panel), (x, y + TITLE_HEIGHT))

    text_width = total_width - 2 * MARGIN
    y = panels_height + LINE_HEIGHT // 2
    for line in wrap(caption or "", font(CAPTION_SIZE), text_width, lines):
        draw.text((MARGIN, y), line, TEXT, font(CAPTION_SIZE), anchor="lm")
        y += LINE_HEIGHT
    y = panels_height + lines * LINE_HEIGHT + LINE_HEIGHT // 2
    for line in wrap(footer, font(TITLE_SIZE), text_width, lines=1):
        draw.text((MARGIN, y), line, FAINT, font(TITLE_SIZE), anchor="lm")
    return np.array(canvas)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Breaks `text` into at most `lines` lines of at most `width` pixels; the last ends in … if text is left.

    White space and characters that cannot be printed count as one blank. A word wider than a line is cut.
    """
    words = "".join(char if char.isprintable() else " " for char in text[:1000]).split()
    wrapped: list[str] = []
    while words and len(wrapped) < lines:
        line, last = words.pop(0), len(wrapped) == lines - 1
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        if last and words or font.getlength(line) > width:
            fitting = line
            while fitting and font.getlength(fitting + "…") > width:
                fitting = fitting[:-1]
            line = fitting.rstrip() + "…"
        wrapped.append(line)
    return wrapped


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all texts in pictures, in a size in pixels."""
    # Matplotlib brings a font that knows most scripts, so that no machine needs one installed.
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _heat_map(rgb: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    height, width = rgb.shape[:2]
    grey = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    level = np.nan_to_num(np.clip(relevance, 0, 1)) * 255
    level = cv2.resize(level.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    colour = cv2.cvtColor(cv2.applyColorMap(level.astype(np.uint8), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(grey, 0.4, colour, 0.6, 0)


def _outlines(rgb: np.ndarray, things: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    height, width = rgb.shape[:2]
    panel = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    labels = []
    for index, (name, probabilities) in enumerate(things):
        colour = ImageColor.getrgb(THING_COLOURS[index % len(THING_COLOURS)])
        level = np.nan_to_num(cv2.resize(probabilities.astype(np.float32), (width, height)))
        weight = 0.6 * level.clip(0, 1)[..., None]
        panel = (panel * (1 - weight) + weight * np.array(colour)).astype(np.uint8)
        contours, _ = cv2.findContours((level > SEEN).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(panel, contours, -1, colour, 1, cv2.LINE_AA)
        if contours:
            y, x = np.argwhere(level > SEEN).mean(0)
            labels.append((name, colour, x, y))
    picture = Image.fromarray(panel)
    draw = ImageDraw.Draw(picture)
    for name, colour, x, y in labels:
        (text,) = wrap(name, font(TITLE_SIZE), width / 2, lines=1) or ("",)
        reach = font(TITLE_SIZE).getlength(text) / 2 + GAP
        place = (min(max(x, reach), width - reach), min(max(y - TITLE_SIZE, GAP), height - 2 * TITLE_SIZE))
        draw.text(place, text, colour, font(TITLE_SIZE), anchor="ma", stroke_width=2, stroke_fill=BACKGROUND)
    return np.array(picture)


def _with_colour_wheel(panel: np.ndarray) -> np.ndarray:
    """Puts a legend into the lower right corner: the colour of each direction, away from the centre."""
    radius = panel.shape[0] // 12
    offsets = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    wheel = flow_to_rgb(np.stack([offsets[1], offsets[0]], -1), radius)
    inside = np.hypot(*offsets) <= radius
    corner = panel[-2 * radius - 1 - GAP : -GAP, -2 * radius - 1 - GAP : -GAP]
    corner[inside] = wheel[inside]
    cv2.circle(corner, (radius, radius), radius, FAINT, 1, cv2.LINE_AA)
    return panel


def _even(length: int) -> int:
    return length + length % 2


class VideoWriter:
    """Writes an H.264 video that browsers play; the file appears under its name only when it is complete.

    Use it in a `with` statement: an exception inside leaves no file behind, and an older one as it was.

    Args:
        path: where the MP4 goes; missing folders are made.
        fps: frames per second.
    """

    def __init__(self, path: str | Path, fps: float = 30) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._fps = Fraction(fps).limit_denominator(1000)
        self._container: av.container.OutputContainer | None = None

    def add(self, frame: np.ndarray) -> None:
        """Appends a uint8 (h, w, 3) frame with even h and w; all frames have the shape of the first."""
        if self._container is None:
            self._open(*frame.shape[:2])
        expected = (self._stream.height, self._stream.width, 3)
        if frame.shape != expected or frame.dtype != np.uint8:
            raise ValueError(f"expected a uint8 frame of shape {expected}, got {frame.dtype} {frame.shape}")
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def _open(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"H.264 needs an even height and width, got {height} x {width}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = {"movflags": "faststart"}
        self._container = av.open(self._partial, "w", format="mp4", container_options=options)
        self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": "18"})
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if self._container is None:
            return  # no frame, no file
        try:
            if exception_type is None:
                self._container.mux(self._stream.encode())  # frames still in the encoder
            self._container.close()
            if exception_type is None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float = 30) -> Path:
    """Writes uint8 (h, w, 3) frames, h and w even, as an H.264 video; see `VideoWriter`. Returns its path."""
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.add(frame)
    return video.path
