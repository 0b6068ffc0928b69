"""The peer of bench_serving.py: a plain diffusers server loop, as one writes it in an afternoon.

    python benchmarks/peer_server.py MODEL --port 8001 [--dtype fp32|bf16] [--adapter NAME=FILE ...]

FastAPI and uvicorn around a `StableDiffusionPipeline`, one request after the other behind a lock; the same JSON in and out as
`stepforge serve` for what the benchmark asks. Adapters are loaded once and switched by `set_adapters` for each request.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

from stepforge.runtime.backends import available_threads


def load(model: Path, dtype: str, adapters: dict[str, Path]) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    torch.set_num_threads(available_threads())
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, dtype=kind, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for name, path in adapters.items():
        if path.is_dir():  # PEFT's layout, which load_lora_weights does not read
            config = json.loads((path / "adapter_config.json").read_text())
            state = load_file(path / "adapter_model.safetensors")
            state = {key.replace("base_model.model.", "unet."): value.to(kind) for key, value in state.items()}
            metadata = {f"unet.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
            pipe.load_lora_into_unet(state, None, pipe.unet, adapter_name=name, metadata=metadata)
        else:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    return pipe


def draw(pipe: Any, body: dict[str, Any]) -> bytes:
    """A picture as PNG."""
    import torch

    if adapters := body.get("adapters"):
        pipe.enable_lora()
        pipe.set_adapters(list(adapters), list(adapters.values()))
    elif pipe.get_list_adapters():
        pipe.disable_lora()
    image = pipe(
        body["prompt"],
        num_inference_steps=body["steps"],
        guidance_scale=body["guidance"],
        generator=torch.Generator().manual_seed(body["seed"]),
    ).images[0]
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE")
    args = parser.parse_args()

    import uvicorn
    from fastapi import Body, FastAPI

    pipe = load(args.model, args.dtype, {n: Path(p) for n, p in (a.split("=", 1) for a in args.adapter)})
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/health/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/images/generations")
    def generations(body: dict[str, Any] = Body()) -> dict[str, Any]:
        with lock:
            picture = draw(pipe, body)
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(picture).decode()}]}

    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
