"""The small embedded models, made from nothing: frames of simulated scenes, CLIP, captioner, measurements."""
