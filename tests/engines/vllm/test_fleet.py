"""A fleet whose worker is vLLM."""

from optimal_sampling.config import FleetConfig, MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.fleet import open_fleet
from optimal_sampling.types import Request
from optimal_sampling.vocabulary import Vocabulary


def test_a_worker_that_is_vllm(tmp_path):
    """Guards: a worker whose vLLM waits for requests for ever, or drops what it has when none
    waits.
    """
    models = ModelConfig(device="cpu")
    vocabulary = Vocabulary.load(models.student, models.teacher)
    options = VllmOptions(batch_size=4, check_models="off")
    requests = [Request(f"{i}", 0, 0, (65, 66, i), (67, i), 6) for i in range(40, 52)]
    fleet = FleetConfig(workers=1)
    with open_fleet(
        options, models, MixtureConfig(), vocabulary, fleet=fleet, logs=tmp_path
    ) as engine:
        assert engine.notes()["workers"].startswith("1 (1 on CPU")
        done = list(engine.generate(iter(requests)))
        again = list(engine.view(MixtureConfig(alpha_min=0.9)).generate(requests[:3]))
    assert {c.request for c in done} == {*requests}
    assert not any(c.error for c in done)
    assert len(again) == 3
    assert min(alpha for c in again for alpha in c.trace["alpha"]) >= 0.9 - 1e-6
    assert (tmp_path / "worker-0.log").exists()
