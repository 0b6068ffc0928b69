"""Search for plans that run fewer rows and draw nearly the same pictures."""
