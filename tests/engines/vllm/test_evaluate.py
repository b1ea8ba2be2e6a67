"""`evaluate --engine vllm`: the scores are those of what vLLM drew."""

from __future__ import annotations

from optimal_sampling.evaluate import EvaluateConfig, evaluate
from optimal_sampling.evaluate.job import run_folder
from optimal_sampling.records import load
from optimal_sampling.toy_pair.problems import is_correct


def test_a_checkpoint_in_vllm(tmp_path):
    """Guards: another mode than that of the local engine, and a hint that its prompt lacks."""
    config = EvaluateConfig(
        extra_models=("toy-student",),
        benchmarks=("synthetic",),
        engine="vllm",
        hint="right",
        num_examples=4,
        max_new_tokens=20,
        output_dir=str(tmp_path / "out"),
    )
    report = evaluate(config)
    records = list(load(run_folder(config, "toy-student", "synthetic")))
    assert len(records) == 4
    assert {r["mode"] for r in records} == {"student"}
    assert all(r["row"]["solution"] in r["student_prompt"] for r in records)
    right = sum(
        is_correct(r["completion"], r["row"]["answer"]) and r["finish_reason"] == "stop"
        for r in records
    )
    (row,) = report.summary["rows"]
    assert row["scores"]["avg@1"]["value"] == right / 4
    assert report.missing == []
