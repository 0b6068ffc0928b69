"""Checkpoints of a LoRA in training: its weights, the optimizer's state and the last step."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict


def resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, file: Path, device: str) -> int:
    """The step to go on with; 1, and nothing is changed, where there is no checkpoint."""
    if not file.exists():
        return 1
    state = torch.load(file, weights_only=True, map_location=device)
    set_peft_model_state_dict(model, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    first = int(state["step"]) + 1
    torch.manual_seed(first)
    return first


def keep(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, file: Path) -> None:
    """Write a checkpoint in the place of the one before: a stopped process leaves one that is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    torch.save(
        {"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict(), "step": step}, partial
    )
    partial.replace(file)
