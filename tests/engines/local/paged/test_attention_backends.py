"""Which attention runs, and what a user is told about it."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optimal_sampling.config import LocalOptions
from optimal_sampling.engines.local.attention import AttentionCall
from optimal_sampling.engines.local.paged import attention_backends
from optimal_sampling.engines.local.paged.attention_backends import (
    FlashOperator,
    choose_backend,
    flash_attn,
    installed_operator,
    varlen,
)
from optimal_sampling.engines.local.paged.page_cache import BatchShape
from optimal_sampling.errors import ConfigError, MissingDependencyError
from tests.distribution.test_fused import needs_triton
from tests.engines.local.conftest import engine_of, tiny_model
from tests.engines.local.paged.conftest import fake_operator

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
LINES = (Path(__file__).parent / "data" / "flash_schemas.txt").read_text().splitlines()
SCHEMAS = dict(line.split("  ", 1) for line in LINES if not line.startswith("#"))
"""`aten::_flash_attention_forward` by version of PyTorch."""


@pytest.fixture
def ampere(monkeypatch):
    """A GPU that Flash Attention runs on, without Triton."""
    monkeypatch.setattr(attention_backends, "triton_version", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.usefixtures("ampere")
class TestOnAGpu:
    def test_auto_takes_pytorchs_own_and_says_so(self):
        choice = choose_backend("auto", CUDA, BF16, {128}, set())
        assert choice.backend is varlen
        assert "Flash Attention 2 auto-enabled" in choice.note
        assert "split-KV" not in choice.note

    @needs_triton
    def test_auto_decodes_with_split_kv_where_triton_runs(self, monkeypatch):
        monkeypatch.setattr(attention_backends, "triton_version", lambda: "3.7.1")
        choice = choose_backend("auto", CUDA, BF16, {128}, set())
        assert choice.backend.__qualname__.startswith("split_or")
        assert "decoding with split-KV (Triton 3.7.1)" in choice.note

    @pytest.mark.parametrize(
        ("dtype", "dims", "needs", "reason"),
        [
            (torch.float32, {128}, set(), "not float32"),
            (BF16, {512}, set(), "[512]"),
            (BF16, {64, 128}, set(), "[64, 128]"),
            (BF16, {128}, {"sinks", "soft caps"}, "sinks and soft caps"),
        ],
    )
    def test_what_it_cannot_do_falls_back_by_name(self, dtype, dims, needs, reason):
        choice = choose_backend("auto", CUDA, dtype, dims, needs)
        assert choice.backend is None
        assert reason in choice.note
        with pytest.raises(ConfigError, match="was asked for"):
            choose_backend("varlen", CUDA, dtype, dims, needs)

    def test_flash_attn_that_is_absent_is_named_with_its_remedy(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        with pytest.raises(MissingDependencyError, match="pip install 'flash-attn"):
            choose_backend("flash_attn", CUDA, BF16, {128}, set())

    def test_an_operator_that_lacks_arguments_leaves_the_package_or_slots(self, monkeypatch):
        """Guards: a fallback several times slower whose cause and cost nobody is told."""
        old = FlashOperator.of(SCHEMAS["2.9.1"].replace("Tensor? seqused_k=None, ", ""))
        choose = partial(choose_backend, operator=old)
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        note = choose("auto", CUDA, BF16, {128}, set()).note
        assert "flash-attn is not installed" in note
        assert "does not take seqused_k" in note
        assert "4 to 8 times slower" in note
        monkeypatch.setitem(sys.modules, "flash_attn", sys)
        choice = choose("auto", CUDA, BF16, {128}, set())
        assert choice.backend is flash_attn
        assert "flash-attn package" in choice.note
        with pytest.raises(ConfigError, match="does not take seqused_k"):
            choose("varlen", CUDA, BF16, {128}, set())

    @pytest.mark.parametrize("version", list(SCHEMAS))
    def test_every_supported_pytorch_has_the_operator(self, version):
        """Guards: slots on a PyTorch whose own Flash Attention could read the pages."""
        operator = FlashOperator.of(SCHEMAS[version])
        assert not operator.problem
        later = version not in ("2.9.0", "2.9.1", "2.10.0", "2.11.0")
        assert ({"block_table", "num_splits"} <= operator.takes) == later
        choice = choose_backend("auto", CUDA, BF16, {128}, set(), operator)
        assert choice.backend is varlen


def test_the_schemas_name_what_the_installed_operator_takes():
    """Guards: fixtures that PyTorch does not print, and a parser that reads fixtures alone."""
    series = torch.__version__.split("+")[0].rsplit(".", 1)[0]
    listed = [text for version, text in SCHEMAS.items() if version.startswith(series + ".")]
    assert FlashOperator.of(listed[-1]) == installed_operator()


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("window", [None, 4])
def test_the_call_binds_to_the_real_operator(width, window):
    """Guards: an argument that the installed operator does not have; needs no GPU."""
    heads, dim, rows, page = 4, 64, 3, 256
    tokens = rows * width
    query = torch.empty(heads, tokens, dim, device="meta", dtype=BF16)
    keys = torch.empty(4 * page, 2, dim, device="meta", dtype=BF16)
    ints = partial(torch.empty, device="meta", dtype=torch.int32)
    shape = BatchShape(tokens, rows, width, 300, tokens)
    plan = SimpleNamespace(
        batch=SimpleNamespace(shape=shape),
        query_ends=ints(rows + 1),
        key_starts=ints(rows + 1),
        keys_used=ints(rows),
    )
    call = AttentionCall(0, query, 0.1, window, None, None)
    assert varlen(call, keys, keys, plan).shape == (tokens, heads, dim)


def test_an_old_gpu_falls_back_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4" in choose_backend("auto", CUDA, BF16, {128}, set()).note


def test_on_a_cpu():
    engine = engine_of(tiny_model(1), tiny_model(2))
    assert engine.notes()["attention"] == "PyTorch SDPA: Flash Attention needs a CUDA GPU"
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        engine_of(tiny_model(1), tiny_model(2), attention="flash_attn")
    with pytest.raises(ConfigError, match="attention must be one of"):
        LocalOptions(attention="flash")


def test_a_backend_that_is_wrong_is_not_used(flash_on_cpu, monkeypatch):
    """Guards: a backend whose numbers are wrong on some GPU, unnoticed by the check at load."""

    def wrong(*args, window_size_left, **kwargs):
        return fake_operator(*args, window_size_left=2, **kwargs)

    wrong.default = fake_operator.default
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", wrong)
    engine = engine_of(tiny_model(1), tiny_model(2))
    assert engine.pair.recorded_graphs is None
    assert "failed its check" in engine.notes()["attention"]


def test_one_model_that_cannot_decides_for_both(flash_on_cpu):
    engine = engine_of(tiny_model(1), tiny_model(2, kind="Gemma2", sliding_window=5))
    assert engine.pair.recorded_graphs is None
    assert "soft caps" in engine.notes()["attention"]
    assert "teacher" in engine.notes()["attention"]
