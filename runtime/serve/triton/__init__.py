"""NVIDIA Triton Inference Server: a model repository (`repository.py`) whose models are engines (`model.py`)."""
