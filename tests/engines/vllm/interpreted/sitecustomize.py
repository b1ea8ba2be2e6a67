"""Python imports this at its start, because the tests put this folder on PYTHONPATH: processes that vLLM starts."""

from tests.engines.vllm.interpreter import install

install()
