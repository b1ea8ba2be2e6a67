"""Workers that are processes, and what may happen to them."""

from __future__ import annotations

import json

import pytest

from optimal_sampling.config import DataConfig, FleetConfig, GenerateConfig, RunConfig
from optimal_sampling.generate import generate
from optimal_sampling.records import load
from tests.engines.fleet.conftest import ROOT
from tests.engines.fleet.engines import FaultyTablesOptions

CAUSES = {
    "raises": "it raised ValueError: a prompt that raises",
    "hangs": "no progress for 3 s",
    "exits": "exit code 7",
    "allocates": "it raised MemoryError: Unable to allocate 16.0 GiB",
}


def problems(folder, texts):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"problem": text}) + "\n" for text in texts))
    return str(path)


def run_config(folder, texts, engine, **fleet):
    return GenerateConfig(
        data=DataConfig(dataset=problems(folder, texts)),
        run=RunConfig(output_dir=str(folder / "run"), max_new_tokens=8),
        fleet=FleetConfig(**fleet),
        engine=engine,
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "faults", [["exits"], pytest.param([*CAUSES], marks=pytest.mark.slow)], ids=["one", "four"]
)
def test_prompts_that_raise_hang_exit_and_allocate(tmp_path, monkeypatch, faults):
    """Guards: one odd prompt that ends a run, takes others with it, or fails without its cause."""
    monkeypatch.syspath_prepend(str(ROOT))
    texts = [f"{i} {fault}" for i, fault in enumerate(["fine", *faults, *["fine"] * 6])]
    config = run_config(tmp_path, texts, FaultyTablesOptions(), workers=2, worker_timeout=3.0)
    summary = generate(config)
    assert (summary.good, summary.failed, summary.owed) == (7, len(faults), 0)
    errors = {record["row"]["problem"].split()[1]: record for record in failures(config)}
    assert errors.keys() == {*faults}
    for fault, record in errors.items():
        assert CAUSES[fault] in record["error"]
        assert record["attempts"] == 1
    logs = sorted((tmp_path / "run" / "logs").iterdir())
    assert [path.name for path in logs] == ["worker-0.log", "worker-1.log"]
    if "raises" in faults:
        text = "".join(path.read_text() for path in logs)
        assert "ValueError: a prompt that raises" in text


def failures(config):
    records = load(config.run.output_dir, failed=True)
    return [record for record in records if record["error"]]
