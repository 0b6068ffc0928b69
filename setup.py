"""One import name: `stepforge/` is the face, `stepforge.runtime` is `runtime/`, and so on; rooms import to their left."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("kernels", "runtime", "export")

BASE = [
    "numpy>=1.26",  # latents, guidance and update algebra on the host
    "pillow>=11.3",  # image encoding, PNG text chunks
    "tokenizers>=0.21",  # CLIP byte-pair encoding without transformers
    "openvino>=2025.4",  # default CPU backend: bf16 at 96 % of the matrix peak (benchmarks/bench_denoiser.py)
    "typer>=0.16",  # the command line: help, completion, validation
    "rich>=13.9",  # progress bars and tables of the command line
    "ml_dtypes>=0.5",  # bfloat16 for NumPy: LoRA files, banks; Apache-2.0, no dependencies but NumPy
    "safetensors>=0.5",  # LoRA files and model weights; the only format read
]
# One import name, so one of the two: no combination of extras below asks for both, and BASE for neither, since openvino is
# what networks run on where nobody chooses (tests/test_packaging.py).
ORT_CPU = "onnxruntime>=1.23"  # second CPU backend; reads and writes .onnx_adapter files
ORT_GPU = "onnxruntime-gpu>=1.23"  # the same, with the CUDA and TensorRT providers
OFFLINE = [
    "torch>=2.9",  # tracing
    "diffusers>=0.38",  # model classes and the parity reference; older ones run code from model folders (CVE-2026-44513)
    "transformers>=5.3",  # text encoders; older ones run code named in config.json (CVE-2026-4372)
    "accelerate>=1.0",  # diffusers loads weights without a second copy in memory
    "peft>=0.18",  # diffusers merges LoRA files by it, for the parity reference; trains the demo's adapters
    "onnx>=1.19",  # graph checker
    "onnxscript>=0.5",  # torch.onnx's translation layer
    "onnx-ir>=0.1.12",  # graph passes and external data
]
EXPORT = [*OFFLINE, ORT_CPU]  # reads every exported graph once
CUDA_BINDINGS = "cuda-bindings>=12.6"  # memory, copies and graphs of CUDA without torch; NVIDIA's own, 8 MB
LOWER = ["onnx>=1.19", "onnx-ir>=0.1.12"]  # graphs in the precision of their plan

SERVER = [  # `stepforge serve`
    "fastapi>=0.162",  # routes and the description at /openapi.json
    "starlette>=1.3.1",  # fastapi's base; older ones: CVE-2026-48710 (Host changes the path), -54282 (limits of forms bypassed)
    "uvicorn>=0.54",  # the server: sockets, HTTP, TLS; BSD
    "python-multipart>=0.0.31",  # forms; older ones: CVE-2026-53537 to -53540
    "prometheus_client>=0.21",  # /metrics; Apache-2.0, no dependencies
]

setup(
    name="stepforge",
    version="0.1.0",
    description="Compile text-to-image diffusion models into engine bundles; run them without torch.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.15",
    install_requires=BASE,
    extras_require={
        "export": EXPORT,
        "control": ["opencv-python-headless>=4.10"],  # the Canny preprocessor; Apache-2.0, needs numpy only
        "parquet": ["pyarrow>=16"],  # `stepforge batch` from and to Parquet; Apache-2.0
        # networks of `--sr NAME=FILE.safetensors`; asks for torchvision, whose wheels fit one build of torch each, so it is no
        # part of `export`. stepforge needs spandrel alone: pip install --no-deps spandrel
        "upscale": ["spandrel>=0.4.1", "einops>=0.8"],
        "plot": ["matplotlib>=3.8"],  # `stepforge tune --plot`
        "onnxruntime": [ORT_CPU],
        "cuda": [ORT_GPU],
        "export-cuda": [*OFFLINE, ORT_GPU],  # the exporter where the CUDA providers are wanted as well
        "torch": [
            "torch>=2.9",  # the backend on NVIDIA GPUs; its wheels for CUDA bring Triton
            "onnx>=1.19",  # reads the bundle's graphs
        ],
        "tensorrt": ["tensorrt>=10.8", CUDA_BINDINGS, *LOWER],  # data-centre GPUs
        "tensorrt-rtx": ["tensorrt-rtx>=1.3", CUDA_BINDINGS, *LOWER],  # desktop GPUs; builds without one
        "tensorrt-lean": ["tensorrt-lean-cu13>=10.8", CUDA_BINDINGS],  # runs version-compatible plans, 44 MB
        "server": SERVER,
        "ray": [
            "ray[serve]>=2.60",
            *SERVER,
        ],  # batches on a cluster; replicas on Ray Serve: 2.60 builds their application late
        "dev": [
            *EXPORT,
            "pytest>=8",  # test runner
            "pytest-xdist>=3.6",  # the suite on all cores; MIT, kept by pytest's own organisation
            "pytest-timeout>=2.3",  # no test may hang CI
            "hypothesis>=6.100",  # property tests
            "scipy>=1.11",  # diffusers' beta and LMS schedules, the oracle of ours
            "lycoris-lora>=3.4",  # the oracle of LyCORIS files
            "triton==3.7.1",  # kernels in its interpreter and ahead of time (golden.json); what torch 2.13 wants on CUDA
            "matplotlib>=3.8",  # as in the extra plot; plots of benchmarks
            "opencv-python-headless>=4.10",  # as in the extra control
            "pyarrow>=16",  # as in the extra parquet
            *SERVER,
            "openai>=3.50",  # the client that the server is written for; Apache-2.0. Its httpx2 calls applications in tests
            "celery>=5.4",  # runs the worker of docs/embedding.md; BSD-3-Clause
            "fonttools>=4.50",  # the emoji list of the demo's training recipe
            "playwright>=1.50",  # the demo page's test drives Debian's Chromium; Apache-2.0, its own browsers are not needed
            "ruff>=0.8",  # format and lint
            "mypy>=1.13",  # types
            "build>=1.2",  # wheel and sdist, as a user would build them
        ],
    },
    package_dir={"stepforge": "stepforge", **{f"stepforge.{room}": room for room in ROOMS}},
    packages=[
        "stepforge",
        *(f"stepforge.{room}{sub}" for room in ROOMS for sub in ("", *(f".{p}" for p in find_packages(room)))),
    ],
    package_data={
        "": ["py.typed"],
        "stepforge.runtime.backends": ["fake_tokenizer.json"],
        "stepforge.runtime.serve.http.page": ["*.html", "*.css", "*.js"],
        "stepforge.kernels.dispatch": ["table.json"],
        "stepforge.kernels.aot": ["golden.json"],
    },
    entry_points={
        "console_scripts": ["stepforge=stepforge.runtime.cli:start"],
        # commands of the offline room join the command line here, so that the run time need not import it
        "stepforge.commands": [
            "export=stepforge.export.cli:export_command",
            "build=stepforge.export.engines.command:build_command",
            "verify=stepforge.export.cli:verify_command",
            "quantize=stepforge.export.cli:quantize_command",
            "lora.convert=stepforge.export.cli:convert_command",
        ],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
