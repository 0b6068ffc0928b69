"""The PyTorch backends of the backend table; importing this package imports torch."""

from stepforge.runtime.backends.torch.backend import Torch, TorchExact

__all__ = ["Torch", "TorchExact"]
