"""Which attention runs, and what a user is told about it."""

import sys

import pytest
import torch

from optimal_sampling.config import LocalOptions
from optimal_sampling.engines.local.paged import attention_backends
from optimal_sampling.engines.local.paged.attention_backends import (
    choose_backend,
    flash_attn,
    varlen,
)
from optimal_sampling.errors import ConfigError, MissingDependencyError
from tests.engines.local.conftest import engine_of, tiny_model

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.usefixtures("ampere")
class TestOnAGpu:
    def test_auto_takes_pytorchs_own_and_says_so(self):
        choice = choose_backend("auto", CUDA, BF16, {128}, set())
        assert choice.backend is varlen
        assert "Flash Attention 2 auto-enabled" in choice.note

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

    def test_an_old_pytorch_takes_the_package_or_falls_back(self, monkeypatch):
        monkeypatch.setattr(attention_backends, "_varlen_exists", lambda: False)
        monkeypatch.setitem(sys.modules, "flash_attn", None)
        assert (
            "flash-attn is not installed" in choose_backend("auto", CUDA, BF16, {128}, set()).note
        )
        monkeypatch.setitem(sys.modules, "flash_attn", sys)
        choice = choose_backend("auto", CUDA, BF16, {128}, set())
        assert choice.backend is flash_attn
        assert "flash-attn package" in choice.note
        with pytest.raises(ConfigError, match="has no varlen_attn"):
            choose_backend("varlen", CUDA, BF16, {128}, set())


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
    from tests.engines.local.paged.conftest import fake_varlen_attn

    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda *args, window_size, **kwargs: fake_varlen_attn(*args, window_size=(2, 0), **kwargs),
    )
    monkeypatch.setattr(attention_backends, "_varlen_exists", lambda: True)
    engine = engine_of(tiny_model(1), tiny_model(2))
    assert not engine.pair.recorded_graphs
    assert "failed its check" in engine.notes()["attention"]


def test_one_model_that_cannot_decides_for_both(flash_on_cpu):
    engine = engine_of(tiny_model(1), tiny_model(2, kind="Gemma2", sliding_window=5))
    assert not engine.pair.recorded_graphs
    assert "soft caps" in engine.notes()["attention"]
    assert "teacher" in engine.notes()["attention"]
