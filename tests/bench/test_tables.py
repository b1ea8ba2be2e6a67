"""What memory, identity and the table of large shapes find, on models of next to nothing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from optimal_sampling.bench import cells, costs, identity, large_shapes
from optimal_sampling.bench.architectures import RandomPair
from optimal_sampling.bench.cells import Budget, Pairs, speculation_bound
from optimal_sampling.bench.harness import Report
from optimal_sampling.bench.own_process import Broken
from optimal_sampling.bench.speed import IDEAL, STUDENT, TEACHER
from optimal_sampling.bench.speed import LOCKSTEP as LOCKSTEP_ROW
from optimal_sampling.bench.subcommands import GpuOptions, Size
from optimal_sampling.bench.workload import Variant
from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.local.paged.page_manager import PAGE, SPARE
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace

MODELS = ModelConfig(device="cpu", dtype="float32")
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
"""Of the tiny shape's keys and values: both, layers, heads, dimensions, float32."""
LOCKSTEP = Variant(draft_tokens=0)


def tiny_pair(kind=RandomPair, **attributes):
    made = kind(MODELS, "tiny", "tiny", prompt_tokens=5)
    vars(made).update(equal_tokens=40, bandwidth=1e9, **attributes)
    return made


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


def footprints(pair, size):
    """The rows of `memory` for one size."""
    report = Report()
    costs.measure_memory(pair, [size], report)
    assert not report.failed
    return report.results


def test_a_batch_that_does_not_fit_completes_by_admission():
    """Guards: running out of memory, or losing texts, where all of a batch does not fit at once."""
    whole, tight = footprints(tiny_pair(), Size(64, 30))
    assert whole["predicted_mib"] == 64 * 35 * 2 * TOKEN_BYTES / 2**20
    assert whole["predicted_mib"] <= whole["kv_mib"]
    assert (whole["most_rows"], whole["finished"]) == (64, 64)
    assert tight["finished"] == 64
    assert tight["most_rows"] < 64
    assert tight["kv_mib"] <= tight["budget_mib"] <= whole["kv_mib"] / 8


def completion(tokens=(1, 2), kl=0.5, captured=1.0):
    trace = TokenTrace.from_rows(
        [(0.5, 0.0, kl, *[float("nan")] * (len(TRACE_FIELDS) - 3))] * len(tokens)
    )
    request = Request("x", 0, 0, (1,), (1,), 4)
    return Completion(
        request, tuple(tokens), "length", trace, captured={"log_q": torch.tensor([captured])}
    )


def test_a_difference_is_found_wherever_it_is():
    """Guards: a comparison that cannot fail; NaN that differs from itself."""
    plain = completion()
    assert identity.differences(plain, completion()) == (False, False)
    assert identity.differences(plain, completion(tokens=(1, 3))) == (True, False)
    assert identity.differences(plain, completion(kl=0.5 + 2**-30)) == (False, True)
    assert identity.differences(plain, completion(captured=-1.0)) == (False, True)
    assert identity.differences(plain, replace(completion(), finish_reason="stop")) == (True, False)


def test_texts_that_differ_fail_the_command():
    """Guards: exit code 0 where speculation changed the text, or where nothing was compared."""
    emulated = tiny_pair(acceptance=0.9)
    report = Report()
    identity.measure(emulated, 4, report)
    assert [found["prompts"] for found in report.results] == [4, 4, 4]
    assert all(found["other_tokens"] for found in report.results)
    assert report.failed
    assert not identity.Comparison.of("nothing", {}, {}).identical
    equal = Report()
    identity.measure(tiny_pair(), 4, equal)
    assert not equal.failed


GPU = GpuOptions(
    device="cpu",
    dtype="float32",
    teacher_shape="tiny",
    student_shape="tiny",
    gap_teacher_shape="tiny",
    gap_student_shape="tiny",
    gap_sizes=("2x3",),
    prompt_tokens=5,
    sizes=("2x4", "8x3"),
    huge="4x12",
    huge_shape="tiny",
    budget=120.0,
)
ROWS = 2 * (len(cells.VARIANTS) - 1) + 1 + len(cells.GAP_ROWS) + 1
"""Cells of these options."""


def tiny_pairs(options=GPU, kv_memory_gib=None):
    pairs = Pairs(options, bandwidth=1e9)
    for pair in pairs.by_name.values():
        pair.kv_memory_gib = kv_memory_gib
    return pairs


def gpu_result(kv_memory_gib=None, change=lambda cell: cell, **options):
    """Everything `bench gpu` shows as lines, its result, and the report."""
    shown = []
    given = replace(GPU, **options)
    report = Report(show=shown.append)
    budget = Budget(given.budget)
    pairs = tiny_pairs(given, kv_memory_gib)
    found = large_shapes.measure(given, cells.tasks_of(given), budget, pairs)
    large_shapes.collect(given, map(change, found), report)
    return [line for line in shown if isinstance(line, str)], report.results[0], report


def test_the_table_of_large_shapes_is_complete_where_time_is_enough():
    """Guards: a script that is first run where it cannot be mended."""
    lines, result, report = gpu_result()
    assert len(result["cells"]) == ROWS
    assert all(cell["complete"] for cell in result["cells"])
    assert not any(line.startswith("skipped: ") for line in lines)
    assert lines[0].startswith("runs: device cpu")
    assert not report.failed
    assert any("emulated acceptance 0.8" in line for line in lines)
    assert set(result["pair"]["bounds"][IDEAL]) == {"2 x 4", "8 x 3"}
    of_size = [c for c in result["cells"] if c["task"]["size"] == {"batch": 8, "tokens": 3}]
    rates = {cell["task"]["row"]: cell["tokens_per_second"] for cell in of_size}
    teacher, student = rates[TEACHER], rates[STUDENT]
    found = {name: ratios["8 x 3"] for name, ratios in result["pair"]["ratios"].items()}
    lockstep = rates[LOCKSTEP_ROW]
    assert found[large_shapes.RATIOS[0][0]] == pytest.approx(lockstep * (1 / teacher + 1 / student))
    speedup = rates[cells.FAST] / teacher
    assert found[large_shapes.SPECULATIVE] == speedup
    bound = speculation_bound(1.0, 0.9)
    assert found[large_shapes.BOUND] == pytest.approx(bound), "equal shapes read equal bytes"
    assert found[large_shapes.REACHED] == pytest.approx(speedup / bound)
    passes = speculation_bound(teacher / student, 0.9)
    assert found[large_shapes.PASSES] == pytest.approx(passes)
    assert found[large_shapes.OF_PASSES] == pytest.approx(speedup / passes)
    uneven, huge = (
        next(cell for cell in result["cells"] if cell["task"]["row"] == row)
        for row in (cells.UNEVEN, cells.HUGE)
    )
    assert 8 <= uneven["tokens"] < 8 * 4
    assert huge["tokens"] == 48
    assert huge["facts"]["finished"] == 4


def test_the_table_of_large_shapes_with_pages(flash_on_cpu):
    """Guards: a script that breaks where rows live in pages, as they do on a GPU only."""
    lines, result, _ = gpu_result(kv_memory_gib=0.02)
    assert result["engine"]["attention"].startswith("Flash Attention")
    assert all(cell["complete"] for cell in result["cells"])
    assert not any(line.startswith("skipped: ") for line in lines)
    facts = result["cells"][-1]["facts"]
    assert facts["kv_gib"] == 4 * 2 * SPARE * PAGE * TOKEN_BYTES / 2**30


def test_cells_are_kept_as_they_are_done_in_another_process():
    """Guards: a killed call that leaves nothing, and options that do not reach the process."""
    saved = []
    report = Report(save=lambda: saved.append(len(report.results[0]["cells"])))
    given = replace(GPU, sizes=("2x3",), gap_sizes=(), huge_share=0)
    large_shapes.run(given, report)
    assert saved == list(range(1, len(cells.VARIANTS) + 1))
    found = report.results[0]["cells"]
    assert not any(cell["skipped"] for cell in found)
    assert {cell["engine"]["device"] for cell in found} == {"cpu"}


def test_recording_that_was_given_up_fails_the_command():
    """Guards: figures of an engine without CUDA graphs that pass for those with them."""
    lines, _, report = gpu_result(change=lambda cell: replace(cell, recording_off="no .item()"))
    assert report.failed
    assert lines[-1] == "FAILED: recording was switched off: no .item()"


def test_insisting_on_attention_that_is_not_there_fails():
    """Guards: `--attention varlen` that measures slots."""
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        gpu_result(attention="varlen")


@pytest.mark.parametrize(
    ("ratio", "bound"), [(0.5, 4.68559 / 4), (1.0, 3.439 / 5), (0.0, (1 - 0.9**17) / 0.1)]
)
def test_the_bound_of_speculation(ratio, bound):
    """Guards: a target that no engine can reach. By hand, best at widths of 6, 4 and 17."""
    assert speculation_bound(ratio, 0.9) == pytest.approx(bound)


def test_caches_of_pages_are_measured_by_the_pages_in_use(flash_on_cpu):
    """Guards: the whole memory, which is allocated from the start, shown as what a batch needs."""
    whole, tight = footprints(tiny_pair(kv_memory_gib=0.02), Size(4, 300))
    assert whole["kv_mib"] == 4 * 2 * SPARE * PAGE * TOKEN_BYTES / 2**20
    assert tight["finished"] == 4
    assert tight["preemptions"] > 0
    assert tight["kv_mib"] <= tight["budget_mib"]


def test_what_the_budget_does_not_allow_is_skipped_and_named():
    """Guards: a call that is killed at its limit and shows nothing; rows that vanish."""
    lines, result, _ = gpu_result(budget=1e-3)
    assert all(cell["skipped"] == "no time left" for cell in result["cells"])
    assert len([line for line in lines if line.startswith("skipped: ")]) == ROWS


class Rounds(Budget):
    """Ends every run after a number of rounds."""

    def __init__(self, most):
        super().__init__(60.0)
        self.most = most

    def share(self, part):
        return self

    def over(self, rounds):
        return rounds == self.most


def test_a_run_that_is_cut_off_counts_the_tokens_that_were_drawn(pair):
    """Guards: tokens of unfinished texts that are lost or counted twice."""

    def run(tokens):
        work = pair.workload(5, tokens)
        engine = pair.engine(work, 3, LOCKSTEP)
        engine.stop = Rounds(9).over
        done = engine.record(work.requests)
        return done.whole.tokens, len(done.lengths), done.rounds

    assert run(4) == (5 * 4, 5, 8)
    assert run(6) == (3 * 6 + 2 * 3, 3, 9)
    assert run(30) == (3 * 9, 0, 9)


class BrokenTeacher(RandomPair):
    """Its teacher alone cannot run."""

    def engine(self, workload, batch_size, variant=LOCKSTEP):
        if variant.mode == "teacher":
            raise RuntimeError("kernel missing\nand more")
        return super().engine(workload, batch_size, variant)


def test_one_cell_that_fails_does_not_cost_the_others():
    """Guards: minutes of measurements lost to one error."""
    given = replace(GPU, sizes=("2x3",), gap_sizes=(), huge_share=0)
    pairs = tiny_pairs(given)
    pairs.by_name["pair"] = tiny_pair(BrokenTeacher)
    found = list(large_shapes.measure(given, cells.tasks_of(given), Budget(60), pairs))
    assert len(found) == len(cells.VARIANTS)
    assert {c.task.row: c.skipped for c in found if c.skipped} == {
        TEACHER: "failed: kernel missing"
    }


class Lost(RandomPair):
    """A GPU on which an illegal access has happened."""

    def engine(self, workload, batch_size, variant=LOCKSTEP):
        if variant.mode == "teacher":
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore")
        return super().engine(workload, batch_size, variant)


def test_an_error_that_the_gpu_keeps_ends_the_process_after_its_cell():
    """Guards: a table of failures after one illegal access."""
    given = replace(GPU, sizes=("2x3",), gap_sizes=(), huge_share=0)
    pairs = tiny_pairs(given)
    pairs.by_name["pair"] = tiny_pair(Lost)
    measured = large_shapes.measure(given, cells.tasks_of(given), Budget(60), pairs)
    found = [next(measured), next(measured)]
    with pytest.raises(Broken):
        next(measured)
    assert [cell.skipped for cell in found] == ["", "failed: CUDA error: an illegal memory access"]


def test_a_cell_that_was_cut_off_is_judged_by_its_decoding(pair):
    """Guards: prompts that weigh on a handful of tokens; a rate from a round or two."""

    def cell(rounds):
        task = cells.Task("pair", Size(2, 400), LOCKSTEP_ROW)
        return cells.measure_cell(pair, task, Rounds(rounds))

    cut = cell(20)
    assert (cut.tokens, cut.complete, cut.skipped) == (40, False, "")
    assert cut.rate == cut.decoding > 0
    assert "as the time was up" in str(cut)
    assert "no more than 3 rounds" in cell(3).skipped


def test_a_cell_is_warmed_up_until_nothing_is_recorded(monkeypatch, pair):
    """Guards: recordings in the run that counts, where lengths of drafts follow from times."""
    recorded = [0, 3, 7, 7, 9]
    loaded = SimpleNamespace(pair=SimpleNamespace(recorded_graphs=0))
    runs = []

    def record(*given):
        runs.append(given)
        loaded.pair.recorded_graphs = recorded[len(runs)]

    monkeypatch.setattr(pair, "loaded", lambda: loaded)
    monkeypatch.setattr(cells, "_record", record)
    cells._warm_up(pair, cells.Task("pair", Size(2, 3), LOCKSTEP_ROW), Budget(60))
    assert len(runs) == 3


def test_large_shapes_are_not_asked_of_a_cpu():
    """Guards: a machine without a GPU that is brought to its knees by two large models."""
    for options in ({"huge_shape": "Qwen3-1.7B"}, {"gap_teacher_shape": "Qwen2.5-7B"}):
        with pytest.raises(ConfigError, match="tiny"):
            large_shapes.run(replace(GPU, **options), Report())
