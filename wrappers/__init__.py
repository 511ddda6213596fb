"""Gymnasium wrappers that add pixels, optical flow and captions to the observations of any environment."""

from wrappers.action_repeat import ActionRepeat
from wrappers.actions import VectorAction
from wrappers.captions import CaptionObservation
from wrappers.errors import UserError
from wrappers.flow import OpticalFlowObservation
from wrappers.meta_world import SeededMetaWorld
from wrappers.pixels import PixelObservation

__all__ = [
    "ActionRepeat",
    "CaptionObservation",
    "OpticalFlowObservation",
    "PixelObservation",
    "SeededMetaWorld",
    "UserError",
    "VectorAction",
]
