"""Which GPUs, threads and memory the workers have."""

import pytest

from optimal_sampling.config import FleetConfig, LocalOptions, ModelConfig, ToyOptions, VllmOptions
from optimal_sampling.engines.fleet.placement import places, threads_asked_for, visible_gpus
from optimal_sampling.errors import ConfigError

GPUS = ["0", "1", "2", "3"]


def devices(workers, options=None, gpus=GPUS, device="auto", **fleet):
    found = places(
        FleetConfig(workers=workers, **fleet),
        ModelConfig(device=device),
        options or LocalOptions(),
        gpus,
    )
    return [place.environment.get("CUDA_VISIBLE_DEVICES") for place in found]


def test_one_worker_per_gpu():
    """Guards: two workers on one GPU, and GPUs without a worker."""
    assert devices("auto") == GPUS
    assert devices(2) == ["0", "1"]
    assert devices("auto", gpus=["5", "GPU-1a2b"]) == ["5", "GPU-1a2b"]


def test_workers_larger_than_a_gpu():
    """Guards: a vLLM worker over two GPUs that sees one."""
    assert devices("auto", VllmOptions(tensor_parallel_size=2)) == ["0,1", "2,3"]
    assert devices("auto", gpus_per_worker=3) == ["0,1,2"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"workers": 5}, "5 workers with 1 GPU each need 5 GPUs, and 4 are visible"),
        ({"workers": 3, "gpus_per_worker": 2}, "need 6 GPUs.*use --workers 2"),
        ({"workers": "auto", "gpus_per_worker": 8}, "fewer --gpus-per-worker"),
        ({"workers": 2, "gpus_per_worker": 0.5}, "needs --ray"),
        ({"workers": 2, "gpus_per_worker": 2, "gpus": []}, "these workers have no GPU"),
        ({"workers": 2, "device": "cuda:1"}, "CUDA_VISIBLE_DEVICES to leave GPUs out"),
        ({"workers": 2, "device": "cuda", "gpus": []}, "finds no CUDA GPU"),
    ],
)
def test_what_is_not_there_is_refused(asked, message):
    """Guards: workers that fail one by one for want of a GPU."""
    with pytest.raises(ConfigError, match=message):
        devices(**asked)


def test_a_preset_list_of_gpus_is_respected(monkeypatch):
    """Guards: a fleet that takes GPUs which were left out, by index or by UUID."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-8f"}) == ["3", "GPU-8f"]
    assert visible_gpus({}) == ["0", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_workers_on_a_cpu_share_threads_and_memory(monkeypatch):
    """Guards: workers that each take all cores, or half of all memory."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    [one] = places(FleetConfig(workers=1), ModelConfig(device="cpu"), LocalOptions())
    three = places(FleetConfig(workers=3), ModelConfig(device="cpu"), LocalOptions())
    assert one.environment == {"OMP_NUM_THREADS": "8"}
    assert [place.environment["OMP_NUM_THREADS"] for place in three] == ["2"] * 3
    assert [place.sharing for place in three] == [3] * 3
    assert three[0].memory == pytest.approx(one.memory / 3, rel=0.1)
    assert three[0].device == "CPU, 2 threads"


def test_auto_on_a_cpu(monkeypatch):
    """Guards: `auto` that fails where there is no GPU."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert len(places(FleetConfig(workers="auto"), ModelConfig(), LocalOptions(), [])) == 6
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert len(places(FleetConfig(workers="auto"), ModelConfig(), ToyOptions(), GPUS)) == 3


def test_options_of_workers_need_workers():
    """Guards: an option that is silently ignored."""
    with pytest.raises(ConfigError, match="worker_timeout is about workers"):
        FleetConfig(worker_timeout=5.0)


@pytest.mark.parametrize(("given", "wanted"), [("0", None), ("abc", None), ("1,4", 1), ("2", 2)])
def test_what_openmp_takes_as_threads(monkeypatch, given, wanted):
    """Guards: a traceback for OMP_NUM_THREADS=0 and for a list of levels."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads_asked_for() == wanted
    assert devices("auto", gpus=[], device="cpu")
