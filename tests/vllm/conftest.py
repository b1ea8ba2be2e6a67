"""Skipped as a whole where vLLM is not installed: it has an environment of its own, see `make test-vllm`."""

import importlib.util
import os

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_[!g]*.py"]  # the gate is plain Python

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if HAS_VLLM and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    from tests.vllm.interpreter import install

    install()


def pytest_collection_modifyitems(items):
    """vLLM and what it imports warn of their own plans; those warnings are not ours to mend."""
    for item in items:
        if "tests/vllm" in str(item.fspath).replace("\\", "/"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny models on disk, by name."""
    from tests.vllm.tiny import save_all

    return save_all(tmp_path_factory.mktemp("models"))


if HAS_VLLM:
    from tests.vllm.serving import client, server, vocabulary  # noqa: F401
