"""Fixtures of the tests with vLLM; see `make test-vllm`."""

from pathlib import Path

import pytest

from tests.engines.vllm.environment import ignored_files, mark_tests

HERE = Path(__file__).parent
collect_ignore = ignored_files(HERE, plain={"test_model_batch.py", "test_trace_store.py"})


def pytest_collection_modifyitems(items):
    mark_tests(items, HERE)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny models on disk, by name."""
    from tests.engines.vllm.tiny import save_all

    return save_all(tmp_path_factory.mktemp("models"))
