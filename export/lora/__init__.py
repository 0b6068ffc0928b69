"""LoRA into weights, and LoRA files into others."""
