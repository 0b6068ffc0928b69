"""TensorRT and TensorRT for RTX: the door. Opening it imports neither library."""

from stepforge.runtime.backends.tensorrt.backend import TensorRt, TensorRtRtx

__all__ = ["TensorRt", "TensorRtRtx"]
