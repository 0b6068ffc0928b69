"""ONNX Runtime's adapter files (.onnx_adapter): named tensors in a FlatBuffer. Read and written for interchange.

The tensors have the names of diffusers' LoRA layout, `unet.<path>.lora_A.weight`, without a scale: it is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stepforge.runtime.errors import AdapterError

SUFFIX = ".onnx_adapter"


def read(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of an adapter file. Raises AdapterError if ONNX Runtime cannot read it."""
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        # its values are views of the adapter's own memory, which goes with it
        return {name: np.array(value.numpy()) for name, value in adapter.get_parameters().items()}
    except Exception as error:  # onnxruntime raises a class of its own per status code, all direct from Exception
        raise AdapterError(
            f"{path} is not a readable ONNX Runtime adapter: {str(error).splitlines()[0][:200]}"
        ) from error


def write(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in tensors.items()}
    adapter.set_parameters(values)
    adapter.export_adapter(str(path))
