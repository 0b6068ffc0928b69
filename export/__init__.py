"""Offline room: checkpoints to bundles, and the proof that a bundle equals its source."""
