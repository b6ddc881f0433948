# Two commands do everything on a fresh machine with Python 3.11: make try, make test.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: try tab test lint format clean miniature gate bench bench-tab bench-webui bench-startup bench-quality bench-validation bench-ablations bench-cost bench-scale bench-reliability

# what is installed follows pyproject.toml; the stamp is renewed when that changes
$(VENV)/.headless: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[headless]"
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.headless
	$(BIN)/pip install --quiet --editable ".[headless,tab,ray,test]"
	touch $@

$(VENV)/.tab: pyproject.toml $(VENV)/.headless
	$(BIN)/pip install --quiet --editable ".[headless,tab]"
	touch $@

# the tab without a WebUI, on the miniature and what make try has left
tab: $(VENV)/.tab try/merged.safetensors
	$(BIN)/python -m ziplora_lib tab --folder try

try/merged.safetensors:
	$(MAKE) try

try: $(VENV)/.headless
	$(BIN)/python -m ziplora_lib.trial try

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

$(VENV)/.benchmarks: pyproject.toml $(VENV)/.headless
	$(BIN)/pip install --quiet --editable ".[headless,benchmarks]"
	touch $@

# trains the miniature again, and who judges its pictures
TOGETHER := OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --nproc-per-node 2
miniature: $(VENV)/.headless
	mkdir -p benchmarks/.cache
	$(TOGETHER) -m benchmarks.miniature.autoencoder benchmarks/.cache/vae.safetensors
	$(TOGETHER) -m benchmarks.miniature.base benchmarks/.cache/vae.safetensors ziplora_lib/hosts/miniature.safetensors
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.judge

gate: $(VENV)/.headless
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.miniature.gate

# ours beside the dense way, on a small UNet and on a slice of SDXL's true widths
bench: $(VENV)/.benchmarks
	$(BIN)/python -m benchmarks.speed --size tiny --rank 16
	$(BIN)/python -m benchmarks.speed --size slice
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep --profile
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.saving
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.footprint
	$(BIN)/python -m benchmarks.costs

# needs a WebUI
bench-webui: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.in_webui
	$(BIN)/python -m benchmarks.costs

# a thousand LoRAs; Chromium
bench-tab: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tab

# needs a WebUI
bench-startup: $(VENV)/.headless
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.startup

# goes on where it was broken off
bench-quality: $(VENV)/.benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.grid
	$(BIN)/python -m benchmarks.quality.run
	$(BIN)/python -m benchmarks.quality.report
	$(BIN)/python -m benchmarks.quality.alignment
	$(BIN)/python -m benchmarks.quality.figure

BEGINNINGS := sum ziplora cold guidance-1 from-regmean from-regmean-cross paper regmean ssr
bench-validation: $(VENV)/.headless
	$(BIN)/python -m benchmarks.quality.run --validation --seeds 8 --rows $(BEGINNINGS)
	$(BIN)/python -m benchmarks.quality.report --table validation

bench-cost: $(VENV)/.headless
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.cost

bench-ablations: $(VENV)/.headless
	$(BIN)/python -m benchmarks.quality.run --table ablations --pairs 8 --lora-seeds 1 --seeds 16
	$(BIN)/python -m benchmarks.quality.report --table ablations --seeds 16 --against default

bench-scale: $(VENV)/.headless
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.scale --full

# an hour or two; needs a WebUI
bench-reliability: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count 100000 --jobs 2 --json benchmarks/results/fuzz.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.failures --json benchmarks/results/failures.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills --json benchmarks/results/kills.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/webui/soak.py state
	OMP_NUM_THREADS=1 $(BIN)/python tests/webui/soak.py mixed
	$(BIN)/python -m benchmarks.reliability

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) try
