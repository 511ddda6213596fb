"""The same wrappers for vectorised environments: one call for all of them."""

from wrappers.vector.captions import CaptionObservation
from wrappers.vector.flow import OpticalFlowObservation

__all__ = ["CaptionObservation", "OpticalFlowObservation"]
