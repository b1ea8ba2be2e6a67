"""The rows of `bench methods`, on few short texts of the shipped pair."""

import pytest

from optimal_sampling.bench.harness import Report
from optimal_sampling.bench.methods import AT_ALL, Measured, measure_batch, variants
from optimal_sampling.bench.workload import ModelPair, Variant
from optimal_sampling.config import MixtureConfig, ModelConfig


def test_every_sharpness_has_its_teacher():
    """Guards: a ratio to a teacher at another temperature."""
    rows = variants()
    for sharpness in ("T = 1", "T = 0.5", "greedy"):
        assert {f"{name}, {sharpness}" for name in AT_ALL} <= rows.keys()
    assert rows["veto, greedy"] == Variant(mixture=MixtureConfig(alpha_method="veto", top_k=1))
    assert rows["teacher alone, T = 0.5"].mode == "teacher"


@pytest.mark.filterwarnings("ignore")
def test_drafts_are_those_of_the_row():
    """Guards: acceptance of another row, and of a teacher that has no drafts."""
    pair = ModelPair(ModelConfig(device="cpu"))
    pair.most_tokens = 12
    report = Report()
    measure_batch(Measured(pair, pair.workload(4), 4), 1, report)
    [table] = report.results
    rows = {row["name"]: row for row in table["rows"]}
    assert rows.keys() == variants().keys()
    for name, row in rows.items():
        alone = name.startswith("teacher")
        assert (row["accepted"] is None) == alone
        assert row["wall"] > 0
        assert (row["to_teacher_cpu"] == 1) == alone
        assert (row["tokens_per_round"] == 1) == alone
