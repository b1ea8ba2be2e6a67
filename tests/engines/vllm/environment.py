"""Settings of every test with vLLM, made before vLLM is imported."""

import importlib.util
import os
from pathlib import Path

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if HAS_VLLM and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    from tests.engines.vllm.interpreter import install

    install()


def ignored_files(folder, plain):
    """Test files of a folder that need vLLM, where there is none; `plain` ones do not need it."""
    return [] if HAS_VLLM else [p.name for p in folder.glob("test_*.py") if p.name not in plain]


def mark_tests(items, folder):
    """Longer time limit; warnings of vLLM and of what it imports are no errors of ours."""
    for item in items:
        if Path(folder) in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(900))
