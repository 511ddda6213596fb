"""Gymnasium wrappers that add pixels, optical flow and captions to observations."""
