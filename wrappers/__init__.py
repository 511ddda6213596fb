"""Gymnasium wrappers that add pixels, optical flow and captions to the observations of any environment."""

from wrappers.action_repeat import ActionRepeat
from wrappers.actions import DiscreteAction, VectorAction
from wrappers.atari import BrightestOfTwoFrames, LifeLoss
from wrappers.captions import CaptionObservation
from wrappers.distractions import Distraction
from wrappers.errors import UserError
from wrappers.flow import OpticalFlowObservation
from wrappers.meta_world import SeededMetaWorld
from wrappers.pixels import PixelObservation

__all__ = [
    "ActionRepeat",
    "BrightestOfTwoFrames",
    "CaptionObservation",
    "DiscreteAction",
    "Distraction",
    "LifeLoss",
    "OpticalFlowObservation",
    "PixelObservation",
    "SeededMetaWorld",
    "UserError",
    "VectorAction",
]
