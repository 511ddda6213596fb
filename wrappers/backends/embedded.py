"""The small models that come with the package. They were trained on one vision tower, so one look serves both."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wrappers.backends.annotation import Annotation, fingerprint
from wrappers.backends.captioners import Description, embedded_model, parse_answer
from wrappers.backends.familiarity import Familiarity, scene_features
from wrappers.backends.vision_language import VisionLanguageAnnotator, patches_per_side
from wrappers.errors import UserError

logger = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
UNFAMILIAR = "an unfamiliar scene"
"""what the captioner says of scenes that it knows it does not know"""


def has_bfloat16() -> bool:
    """Whether this processor computes with it, several times faster than with float32, rather than emulating it."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def learned_from(spec: str) -> dict[str, Any]:
    """What the models that `spec` names were trained on: `domains`, and `left_out`, one that they never saw; empty
    where `semore-bench train-guidance` has not said so.

    Raises:
        UserError: if the models are missing, or what they say of it is damaged.
    """
    clip = embedded_model("clip", spec)
    learned = _config(clip).get("learned_from", {"domains": [], "left_out": ""})
    try:
        domains, left_out = list(map(str, learned["domains"])), str(learned["left_out"])
    except (TypeError, LookupError):
        raise UserError(f"{clip / CONFIG}: learned_from must say domains and left_out, got {learned!r}") from None
    return {"domains": domains, "left_out": left_out} if left_out else {}


def _config(clip: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((clip / CONFIG).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(clip, error) from error


def _damaged(clip: Path, error: Exception) -> UserError:
    return UserError(f"CLIP model {clip} cannot be loaded: {CONFIG} is missing or damaged ({error!r})")


class EmbeddedAnnotator(VisionLanguageAnnotator):
    """CLIP and captioner of this package; shown a kind of scene that they do not know, it logs a warning.

    A frame is unfamiliar if the captioner says so, or if its features lie far from those of all scenes of the training
    (`Familiarity`): nothing is named in it, and its caption is `UNFAMILIAR`. The models are loaded when the first frame
    comes.

    Args:
        device: a torch device; by default the GPU where there is one.
        folder: where the models lie, as `semore-bench train-guidance` writes them.

    Raises:
        UserError: if the models are missing.
    """

    frames_to_check = 32

    def __init__(self, device: str | None = None, folder: str | Path | None = None):
        folder = Path(folder) if folder else embedded_model("clip").parent
        config = _config(folder / "clip")
        try:
            embedding_dim, grid = config["model_cfg"]["embed_dim"], patches_per_side(config)
            width = config["model_cfg"]["vision_cfg"]["width"]
        except (LookupError, TypeError, AttributeError) as error:
            raise _damaged(folder / "clip", error) from error
        self.folder, self.device = folder, device
        self._familiarity = Familiarity.load(folder / "clip", 2 * width)
        self._checked = self._unfamiliar = 0
        self._set_up(
            source="embedded",
            identity=f"embedded {fingerprint(folder / 'clip')} {fingerprint(folder / 'captioner')}",
            embedding_dim=embedding_dim,
            grid=grid,
        )

    def __deepcopy__(self, memo: dict) -> EmbeddedAnnotator:
        return self  # weights are shared: `env.spec` copies the arguments of wrappers

    @functools.cached_property
    def clip(self):
        """The CLIP, a `ClipGrounding`."""
        from wrappers.backends.clip import ClipGrounding

        return ClipGrounding(self.folder / "clip", device=self.device, dtype=self.dtype)

    @functools.cached_property
    def _writer(self):
        from wrappers.backends.captioners import load_transformers
        from wrappers.backends.writer import Writer

        processor, model = load_transformers(str(self.folder / "captioner"), str(self.clip.device), self.dtype)
        return Writer(model, processor.tokenizer)

    @functools.cached_property
    def dtype(self):
        """What the models calculate in: bfloat16, at half of the time, on a CPU that multiplies it; else float32."""
        import torch

        return torch.bfloat16 if self.device == "cpu" and has_bfloat16() else torch.float32

    def statistics(self) -> dict[str, float]:
        """Those of `VisionLanguageAnnotator`, and the `unfamiliar_share` of the frames that were checked."""
        return super().statistics() | {"unfamiliar_share": self._unfamiliar / max(self._checked, 1)}

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation | None]:
        """Annotates uint8 (H, W, 3) frames, in one batch."""
        annotations = super().annotate(frames, frame_steps)
        if self._checked < self.frames_to_check:
            self._check([annotation.caption if annotation else "" for annotation in annotations])
        return annotations

    def _look(self, frames: Sequence[np.ndarray]) -> tuple[list[Description | None], np.ndarray]:
        look = self.clip.look(frames)
        described: list[Description | None] = [Description(UNFAMILIAR, ())] * len(frames)
        known = np.arange(len(frames))
        if self._familiarity:
            known = np.flatnonzero(self._familiarity.knows(scene_features(look.tokens.float().cpu().numpy())))
        if len(known):
            for index, answer in zip(known, self._writer(look.tokens[known]), strict=True):
                described[index] = parse_answer(answer)
        return described, look.patches

    def _check(self, captions: list[str]) -> None:
        self._checked += len(captions)
        self._unfamiliar += captions.count(UNFAMILIAR)
        if self._checked >= self.frames_to_check and self._unfamiliar > self._checked / 2:
            logger.warning(
                "annotator 'embedded' does not know this kind of scene (%d of %d frames) and names nothing in it; "
                "name a real model, transformers:<name> or openai:<base url>#<model>",
                self._unfamiliar,
                self._checked,
            )
