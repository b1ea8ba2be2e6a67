"""Imported by Python at its start in processes of vLLM: the tests put this folder on PYTHONPATH."""

from tests.engines.vllm.interpreter import install

install()
