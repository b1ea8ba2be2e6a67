"""Split-KV attention: its tests in Triton's interpreter. `registers.py --check` compiles it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distribution.test_fused import in_own_process, needs_triton

HERE = Path(__file__).parent


@needs_triton
@pytest.mark.timeout(600)
def test_split_attention_in_the_interpreter():
    """Guards: everything that `interpreted_attention.py` lists."""
    in_own_process(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted_attention.py"],
        TRITON_INTERPRET="1",
    )
