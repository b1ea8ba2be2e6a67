"""Python imports this at its start, because the tests put this folder on PYTHONPATH: processes that vLLM starts."""

import tests.vllm.interpreter  # noqa: F401
