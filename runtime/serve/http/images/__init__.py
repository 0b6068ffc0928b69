"""One request for images: its fields and pictures, its answer whole or as a stream of events."""
