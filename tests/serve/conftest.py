"""Fixtures of the tests of the server; see `make test-vllm`."""

from pathlib import Path

from tests.engines.vllm.environment import HAS_VLLM, ignored_files, mark_tests

HERE = Path(__file__).parent
collect_ignore = ignored_files(HERE, plain={"test_request_body.py"})


def pytest_collection_modifyitems(items):
    mark_tests(items, HERE)


if HAS_VLLM:
    from tests.serve.serving import client, server, vocabulary  # noqa: F401
