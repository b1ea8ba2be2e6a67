"""What happens before the workers of a fleet start."""

from __future__ import annotations

import huggingface_hub
import pytest

from optimal_sampling.config import FleetConfig, LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.engines.fleet import open_fleet
from optimal_sampling.errors import ModelError


@pytest.mark.parametrize(
    ("mode", "fetched"), [("mixture", ["owner/small", "owner/large"]), ("teacher", ["owner/large"])]
)
def test_models_of_a_hub_are_fetched_before_workers_start(
    tmp_path, monkeypatch, vocabulary, mode, fetched
):
    """Guards: weights that every worker downloads within the time for loading."""
    asked = []

    def snapshot_download(name, revision, ignore_patterns):
        assert revision is None
        assert "*.safetensors" not in ignore_patterns
        asked.append(name)
        if name == "owner/large":
            raise OSError("no space left")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    models = ModelConfig(student="owner/small", teacher="owner/large", device="cpu")
    with pytest.raises(ModelError, match="cannot download model 'owner/large': no space left"):
        open_fleet(
            LocalOptions(),
            models,
            MixtureConfig(),
            vocabulary,
            mode,
            fleet=FleetConfig(workers=2),
            logs=tmp_path,
        )
    assert asked == fetched
    assert not [*tmp_path.iterdir()]
