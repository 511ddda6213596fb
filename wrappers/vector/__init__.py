"""The same wrappers for vectorised environments: one call of a model for all of them."""

from wrappers.vector.captions import CaptionObservation

__all__ = ["CaptionObservation"]
