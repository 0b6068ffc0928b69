"""Online room: plans, samplers, the engine, backends, the command line. Imports neither torch nor diffusers."""

import os

# ONNX Runtime 1.29 and later upload usage data, through threads of their own that start with its import, unless this is set
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
