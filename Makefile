# Thin targets; what they do is in scripts/ and in the crates. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
CARGO ?= cargo
PYTHON ?= python3
NAME ?= demo
SEED ?= 1
ARGS ?=
TARGETS ?=
SECONDS ?= 600
BIN := $(or $(CARGO_TARGET_DIR),target)/debug
SITE := import sysconfig; print(sysconfig.get_path('purelib'))
RELEASE := $(or $(CARGO_TARGET_DIR),target)/release

.PHONY: help setup build demo servers test sim experiment mutations chaos lint bench bench-checkpoint bench-control storage-test continuation lineage-check bench-ranks doc fuzz parity deploy-check slurm-test image-test clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## fetch libtorch 2.11.0 (once, into the user's cache), or use the PyTorch 2.11 that is installed
	@$(PYTHON) scripts/libtorch.py

build: setup ## build every binary
	$(CARGO) build --workspace --bins

demo: build ## train the small think-then-generate model across real processes (SEED=1 NAME=demo ARGS=--resume)
	@$(BIN)/duet demo --config configs/demo.toml --name $(NAME) --seed $(SEED) $(ARGS)

servers: ## install the object stores that tests start: moto and Azurite, into .venv-servers (PyPI, npm; 350 MB)
	@scripts/servers.sh

test: build servers ## every test of the workspace, and 1,000 seeds of the simulator
	$(CARGO) test --workspace --lib --bins --tests
	$(BIN)/duet-sim --seeds 1000

sim: ## attack the scheduler with 1,000 seeds (ARGS="--seed 42 --seeds 1" repeats one)
	$(CARGO) run -p duet-sim -- --seeds 1000 $(ARGS)

experiment: build ## the rows of the paper's tables in the small world, three seeds (ARGS="--seeds 1 --row sft")
	$(BIN)/duet experiment paper $(ARGS)

mutations: ## show that the simulator finds each of the scheduler's seeded faults
	$(CARGO) run -p duet-sim --features mutations -- --mutations

chaos: setup ## kill, freeze, cut off and starve a real run in every way there is (SEED=1 ARGS="kill-all" plays some)
	$(CARGO) build --workspace --bins
	$(BIN)/duet-chaos --seed $(SEED) $(ARGS)

lint: setup ## formatting, clippy without warnings, shell scripts
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings

bench: setup ## time the models beside transformers, diffusers and peft (a Python environment in .venv, about 5 GB)
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r scripts/parity/requirements.txt
	$(CARGO) build --release --workspace --example speed
	.venv/bin/python scripts/bench/models.py $(RELEASE)/examples/speed $(ARGS)
	$(MAKE) bench-checkpoint bench-ranks ARGS=

bench-checkpoint: setup ## a checkpoint of 1 GiB by two ranks beside torch.distributed.checkpoint, and publication to four workers (.venv as for parity)
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r scripts/parity/requirements.txt
	$(CARGO) build --release --workspace --example checkpoint
	.venv/bin/python scripts/bench/checkpoint.py $(RELEASE)/examples/checkpoint $(ARGS)

bench-control: setup ## the coordinator beside Ray in the same run, figures in target/bench/control.json (Ray in .venv-bench; TMPDIR chooses the disk)
	test -d .venv-bench || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet ray==2.60.0
	$(CARGO) build --release --workspace --example control --example crowd
	.venv-bench/bin/python scripts/bench/control.py $(RELEASE)/examples/control $(RELEASE)/examples/crowd $(ARGS)

storage-test: setup ## checkpoints on Ceph's RGW and on s3s-fs, disturbed (minutes; installs s3s-fs with cargo; Ceph from Debian)
	scripts/storage_test.sh

continuation: build ## kill a job at every tenth of 40 steps: the same weights, bit for bit (minutes)
	$(CARGO) test -p duet-tests --test continuation -- --ignored --nocapture

lineage-check: build ## a small run's tables, read by DuckDB and pandas (a Python environment in .venv-lineage)
	scripts/lineage_check.sh $(BIN)

bench-ranks: setup ## all-reduce of two ranks beside PyTorch's own Gloo (PyTorch in .venv), and a step with and without overlap
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r scripts/parity/requirements.txt
	$(CARGO) build --release --workspace --example allreduce --example overlap
	.venv/bin/python scripts/bench/collectives.py $(RELEASE)/examples/allreduce $(RELEASE)/examples/overlap $(ARGS)

doc: setup ## API documentation of the workspace
	$(CARGO) doc --workspace --no-deps

fuzz: setup ## search every decoder for inputs that break it, ten minutes each (SECONDS=600 TARGETS="config proto")
	scripts/fuzz.sh $(SECONDS) $(TARGETS)

parity: setup ## compare with diffusers, transformers and peft (makes a Python environment in .venv, about 5 GB)
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r scripts/parity/requirements.txt
	test -d .venv-older || $(PYTHON) -m venv .venv-older
	.venv/bin/python -c "$(SITE)" >"$$(.venv-older/bin/python -c "$(SITE)")/newer.pth"
	.venv-older/bin/pip install --quiet --no-deps -r scripts/parity/older.txt
	.venv/bin/python scripts/parity/run.py --older .venv-older/bin/python

deploy-check: build ## render and validate the chart, lint images, scripts and units (a Python environment in .venv-deploy, about 400 MB)
	test -d .venv-deploy || $(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/pip install --quiet -r scripts/deploy/requirements.txt
	.venv-deploy/bin/python scripts/deploy/check.py $(BIN)/duet

slurm-test: build ## a run on a Slurm cluster of five nodes on this machine, cut off and requeued (root; Debian's slurm-wlm, munge)
	scripts/deploy/slurm_test.sh $(BIN)

image-test: build ## the container images built and run with podman, and played as a Kubernetes Pod (root; podman, runc, debootstrap, patchelf)
	scripts/deploy/image_test.sh $(BIN)

clean: ## remove build output (the cached libtorch stays)
	$(CARGO) clean
