"""Online room: plans, samplers, the engine, backends, the command line. Imports neither torch nor diffusers."""

import os
import sys

# ONNX Runtime 1.29 and later upload usage data, through threads of their own that start with its import, unless this is set
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# OpenVINO's Python package (2026.4) tells Google Analytics of each import, by a process that it forks, and keeps an identity in
# the home folder. Where its telemetry package cannot be imported it takes a stub; None makes that import an ImportError.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
