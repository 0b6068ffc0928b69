"""The proof: a bundle against diffusers."""
