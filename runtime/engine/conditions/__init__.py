"""What rows are conditioned on: prompts (text.py, prompts.py) and what ControlNets are shown (controls.py, hints.py)."""
