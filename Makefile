# Each target does its own set-up; `make demo` and `make test` work on a fresh machine with Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test quick test-long test-soak test-interop test-engines aot test-gpu check bench bench-quick train clean

ADAPTERS := examples/emoji/adapters
CONTROL := --control silhouette=examples/emoji/control/silhouette
DRAW := --guidance 3 --sampler dpmpp_2m --steps 10 --overwrite
SR := --sr sr=examples/emoji/sr --sr subject_sr=out/subject_sr

demo: $(STAMP)  ## export the demo model, verify it against diffusers, draw four contact sheets into out/
	$(BIN)/python examples/emoji/sr_merge.py out/subject_sr
	$(BIN)/stepforge export examples/emoji/model -o out/emoji.bundle --name emoji --lora-slots 6 --lora-rank 16 \
		$(CONTROL) $(SR) --reuse tgate --reuse deepcache --overwrite
	$(BIN)/stepforge verify out/emoji.bundle examples/emoji/model $(CONTROL) $(SR) \
		--prompt "cat face on a blue background" --guidance 3 --steps 10
	$(BIN)/stepforge generate out/emoji.bundle --prompts examples/emoji/prompts.txt $(DRAW) \
		--out out/emoji --sheet out/emoji.png
	$(BIN)/stepforge generate out/emoji.bundle --requests examples/emoji/adapters.jsonl $(DRAW) \
		--adapter poster=$(ADAPTERS)/poster --adapter thermal=$(ADAPTERS)/thermal \
		--adapter subject=$(ADAPTERS)/subject.safetensors \
		--out out/adapters --sheet out/adapters.png --columns 3
	$(BIN)/stepforge generate out/emoji.bundle --requests examples/emoji/control.jsonl $(DRAW) \
		--out out/control --sheet out/control.png --columns 5
	$(BIN)/python examples/emoji/stages_sheet.py out/emoji.bundle --out out/stages.png
	@echo "look at out/emoji.png, out/adapters.png, out/control.png and out/stages.png"

# one process a core, each with a run of neighbouring tests, of which one without work takes some; a crash ends one process and
# names its test
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

test: $(STAMP)  ## the whole suite
	$(BIN)/pytest $(PARALLEL)

quick: $(STAMP)  ## without the slow tests
	$(BIN)/pytest $(PARALLEL) -m "not slow and not long"

test-long: $(STAMP)  ## every family in every precision on every engine, and the demo model from its weights to images
	$(BIN)/pytest $(PARALLEL) -m long

test-soak: $(STAMP) .venv-http/.installed  ## hostile inputs by the thousand through every door, batches killed, mixed requests, a server overrun; counts into benchmarks/results
	test -d out/emoji.bundle || $(MAKE) demo
	$(BIN)/python tests/fuzz/soak.py --json benchmarks/results/soak.json
	.venv-http/bin/python tests/fuzz/guided.py --json benchmarks/results/guided.json
	$(BIN)/python benchmarks/batch_kills.py --json benchmarks/results/batch_kills.json
	$(BIN)/python benchmarks/batch_memory.py --json benchmarks/results/batch_memory.json
	$(BIN)/python benchmarks/soak_engine.py out/emoji.bundle --adapter poster=$(ADAPTERS)/poster \
		--adapter thermal=$(ADAPTERS)/thermal --json benchmarks/results/soak_engine.json
	$(BIN)/python benchmarks/soak_engine.py fake --backend fake --side 64 --json benchmarks/results/soak_engine_fake.json
	$(BIN)/python benchmarks/serving_load.py out/emoji.bundle --adapter thermal=$(ADAPTERS)/thermal \
		--adapter poster=$(ADAPTERS)/poster/pytorch_lora_weights.safetensors --json benchmarks/results/serving_load.json

# other people's servers clash with each other and with NumPy 2: environments beside the suite's, 2 GB, made when asked for
INTEROP := ray triton http

test-interop: $(INTEROP:%=.venv-%/.installed)  ## Ray, Ray Serve, MLPerf LoadGen, NVIDIA Triton and schemathesis themselves, on two cores
	.venv-ray/bin/pytest tests/interop/test_ray.py tests/interop/test_ray_serve.py tests/interop/test_mlperf.py
	.venv-triton/bin/pytest tests/interop/test_triton.py
	.venv-http/bin/pytest tests/interop/test_http.py

.venv-%/.installed: setup.py tests/interop/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --upgrade pip
	.venv-$*/bin/pip install --quiet --no-compile -r tests/interop/$*.txt
	.venv-$*/bin/pip install --quiet --editable .
	touch $@

ENGINES := .venv-engines

test-engines: $(ENGINES)/.installed  ## TensorRT for RTX builds the demo model for three GPUs without one; an environment of 3.3 GB
	$(ENGINES)/bin/pytest -n 2 --dist loadfile tests/export/engines tests/runtime/backends/tensorrt

$(ENGINES)/.installed: setup.py requirements.txt tests/export/engines/requirements.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --upgrade pip
	$(ENGINES)/bin/pip install --quiet --no-compile -r requirements.txt -r tests/export/engines/requirements.txt
	$(ENGINES)/bin/pip install --quiet --no-compile --no-deps --editable .
	touch $@

aot: $(STAMP)  ## every kernel compiled for six architectures, against golden.json (4 minutes on 2 cores)
	$(BIN)/python -m stepforge.kernels.aot --check

test-gpu: export TRITON_INTERPRET := 0
test-gpu: $(STAMP)  ## on an NVIDIA GPU: kernels, networks and parity, six minutes at most, into out/gpu/report.json
	$(BIN)/python benchmarks/check_gpu.py
	$(BIN)/python benchmarks/gpu_report.py

check: $(STAMP)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

BENCH := .venv-bench

bench-quick: $(BENCH)/.installed  ## the suite beside its peers, some 15 minutes on 2 cores: benchmarks/results/suite/quick.md
	$(BENCH)/bin/python benchmarks/bench.py quick

bench: $(BENCH)/.compiled  ## the same in full: SD 1.5's and XL's shapes, 20 steps, torch.compile; hours, 50 GB of disk
	$(BENCH)/bin/python benchmarks/bench.py full

# stable-diffusion.cpp has no wheel: pip compiles it, which takes long; where it cannot, the report says so
$(BENCH)/.compiled: $(BENCH)/.installed benchmarks/suite/sdcpp.txt
	$(BENCH)/bin/pip install --quiet --no-compile --no-deps -r benchmarks/suite/sdcpp.txt || true
	touch $@

# the suite's environment with its peers: what it cannot have, the report says
$(BENCH)/.installed: setup.py requirements.txt benchmarks/suite/peers.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --upgrade pip
	$(BENCH)/bin/pip install --quiet --no-compile -r requirements.txt
	$(BENCH)/bin/pip install --quiet --no-compile --no-deps spandrel==0.4.2  # without torchvision, see setup.py
	while read -r peer; do $(BENCH)/bin/pip install --quiet --no-compile --no-deps $$peer || true; done < benchmarks/suite/peers.txt
	$(BENCH)/bin/pip install --quiet --no-compile --no-deps --editable .
	touch $@

train: $(STAMP)  ## the demo model from nothing: needs Debian's fonts-noto-color-emoji, about 2.5 hours on 2 cores
	$(BIN)/python examples/emoji/train_vae.py
	$(BIN)/python examples/emoji/train_vae.py --resume --domain 0.7 --steps 700 --lr 6e-4
	$(BIN)/python examples/emoji/train_unet.py

# --no-compile: most modules are never imported; those that are get their byte code then
$(STAMP): setup.py requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -r requirements.txt
	$(BIN)/pip install --quiet --no-deps spandrel==0.4.2  # without torchvision, see setup.py
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-* build dist out *.egg-info
