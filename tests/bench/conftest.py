"""Fixtures that other tests have already."""

from tests.engines.local.paged.conftest import flash_on_cpu

__all__ = ["flash_on_cpu"]
