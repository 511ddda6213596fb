"""The small embedded models, trained from scratch: frames of simulated scenes, CLIP, captioner, measurements."""
