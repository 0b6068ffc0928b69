"""LoRA files: reading, naming, algebra. NumPy only; the exporter's merge and the engine's bank both stand on it."""
