"""Pictures of the engine: latents to pixels and back, and networks from pixels to pixels."""
