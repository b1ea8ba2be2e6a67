"""What memory, identity and the table of large shapes find, on models of next to nothing."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from optimal_sampling.bench import (
    BenchOptions,
    gpu_cells,
    gpu_tables,
    identity,
    memory,
    run_bench,
    workload,
)
from optimal_sampling.bench.options import Size
from optimal_sampling.bench.shapes import ShapeBench
from optimal_sampling.bench.speed import IDEAL
from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.local import engine
from optimal_sampling.engines.local.paged.page_manager import PAGE, SPARE
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, Request, TokenTrace

MODELS = ModelConfig(device="cpu", dtype="float32")


@pytest.fixture
def pages(flash_on_cpu, monkeypatch):
    """Rows live in pages, of which there are few enough to be made in no time."""
    monkeypatch.setitem(engine.MEMORY_SHARE, "cpu", 1e-3)


@pytest.fixture(scope="module")
def pair():
    return ShapeBench(MODELS, "tiny", "tiny", prompt_tokens=5, new_tokens=40)


def silent(text):
    return None


def test_a_batch_that_does_not_fit_completes_by_admission(pair):
    """Guards: running out of memory, or losing texts, where all of a batch does not fit at once."""
    whole, tight = memory.measure_memory(pair, (Size(64, 30),), silent)
    assert whole.predicted_mib == 64 * 35 * 2 * (2 * 2 * 2 * 16 * 4) / 2**20
    assert whole.predicted_mib <= whole.kv_mib
    assert (whole.most_rows, whole.finished) == (64, 64)
    assert tight.finished == 64
    assert tight.most_rows < 64
    assert tight.kv_mib <= tight.budget_mib <= whole.kv_mib / 8


def completion(tokens=(1, 2), kl=0.5, captured=1.0):
    trace = TokenTrace.from_rows([(0.5, 0.0, kl, *[float("nan")] * 8)] * len(tokens))
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


def test_texts_that_differ_fail_the_command(pair, monkeypatch):
    """Guards: exit code 0 where speculation changed the text, as emulated acceptance does; nothing compared at all."""
    emulated = identity.compare_texts(pair, pair.workload(4), silent)
    assert [c.prompts for c in emulated] == [4, 4]
    assert not any(c.identical for c in emulated)
    assert not identity.Comparison("nothing").identical
    monkeypatch.setattr(identity, "compare_texts", lambda *_: emulated)
    options = BenchOptions(what="identity", models=MODELS, num_prompts=2, **SHAPES)
    assert run_bench(options, Console(file=io.StringIO())) == 1


SHAPES = {"teacher_shape": "tiny", "student_shape": "tiny", "prompt_tokens": 5}
GPU = {
    "what": "gpu",
    "models": MODELS,
    "sizes": ("2x4", "8x3"),
    "huge": "4x12",
    "huge_shape": "tiny",
    **SHAPES,
}


def gpu_line(**options):
    console = Console(width=100, file=io.StringIO())
    assert run_bench(BenchOptions(**{**GPU, **options}), console) == 0
    text = console.file.getvalue()
    return text, json.loads(text.strip().splitlines()[-1])["results"][0]


def test_the_table_of_large_shapes_is_complete_where_time_is_enough(monkeypatch):
    """Guards: a script that is first run where it cannot be mended."""
    monkeypatch.setattr(workload, "memory_bandwidth", lambda device: 1e9)
    text, result = gpu_line(budget=120.0)
    assert len(result["cells"]) == 2 * len(gpu_cells.ROWS)
    assert all(
        c["complete"] and c["tokens"] == c["size"]["batch"] * c["size"]["tokens"]
        for c in result["cells"]
    )
    assert "skipped: " not in text
    assert set(result["bounds"][IDEAL]) == {"2 x 4", "8 x 3"}
    assert [t["wanted"] for t in result["targets"]] == [0.9, 0.9, 1.2]
    assert (result["admission"]["finished"], result["admission"]["tokens"]) == (4, 48)
    assert "emulated acceptance 0.8" in text


def test_the_table_of_large_shapes_with_pages(pages, monkeypatch):
    """Guards: a script that breaks where rows live in pages, as they do on a GPU only."""
    monkeypatch.setattr(workload, "memory_bandwidth", lambda device: 1e9)
    text, result = gpu_line(budget=120.0)
    assert result["engine"]["attention"].startswith("Flash Attention")
    assert all(c["complete"] for c in result["cells"])
    assert "skipped: " not in text
    assert result["admission"]["finished"] == 4
    assert result["admission"]["kv_gib"] == 4 * 2 * SPARE * PAGE * (2 * 2 * 2 * 16 * 4) / 2**30


def test_caches_of_pages_are_measured_by_what_is_taken(pages):
    """Guards: the whole memory, which is there from the start, shown as what a batch needs."""
    pair = ShapeBench(MODELS, "tiny", "tiny", prompt_tokens=5)
    [whole, tight] = memory.measure_memory(pair, (Size(4, 300),), silent)
    assert whole.kv_mib == 4 * 2 * SPARE * PAGE * (2 * 2 * 2 * 16 * 4) / 2**20
    assert tight.finished == 4
    assert tight.preemptions > 0
    assert tight.kv_mib <= tight.budget_mib


def test_what_the_budget_does_not_allow_is_skipped_and_said(monkeypatch):
    """Guards: a call that is killed at its limit and shows nothing; rows that vanish."""
    monkeypatch.setattr(workload, "memory_bandwidth", lambda device: 1e9)
    text, result = gpu_line(budget=1e-3)
    assert all(cell["skipped"] == "no time left" for cell in result["cells"])
    assert text.count("skipped: ") == 2 * len(gpu_cells.ROWS) + 1
    assert result["admission"]["skipped"] == "no time left"


def ending_after(rounds, original=gpu_cells.Watch.after):
    """A watch whose time is up after so many rounds."""

    def after(self, models, rows):
        original(self, models, rows)
        if self.rounds == rounds:
            self.deadline = 0.0

    return after


def test_a_run_that_is_cut_off_counts_what_was_drawn(pair, monkeypatch):
    """Guards: tokens of unfinished texts that are lost or counted twice."""
    monkeypatch.setattr(gpu_cells.Watch, "after", ending_after(9))
    done = gpu_cells.run_bounded(pair, pair.workload(5, 4), 3, 1e6, {"draft_tokens": 0})
    assert (done.tokens, done.finished) == (5 * 4, 5)
    done = gpu_cells.run_bounded(pair, pair.workload(5, 30), 3, 1e6, {"draft_tokens": 0})
    assert (done.tokens, done.finished, done.watch.rounds) == (3 * 9, 0, 9)


def test_one_cell_that_fails_does_not_cost_the_others(pair, monkeypatch):
    """Guards: minutes of measurements lost to one error."""
    working = gpu_cells.run_bounded

    def broken(bench, work, batch, seconds, how):
        if how == gpu_cells.ROWS[gpu_cells.TEACHER]:
            raise RuntimeError("kernel missing\nand more")
        return working(bench, work, batch, seconds, how)

    monkeypatch.setattr(gpu_cells, "run_bounded", broken)
    cells = gpu_cells.measure_cells(pair, (Size(2, 3),), gpu_cells.Clock(60), silent, silent)
    assert {c.row: c.skipped for c in cells if c.skipped} == {
        gpu_cells.TEACHER: "failed: kernel missing"
    }


def test_a_cell_that_was_cut_off_is_judged_by_its_decoding(pair, monkeypatch):
    """Guards: prompts that weigh on a handful of tokens; a rate from a round or two."""
    monkeypatch.setattr(gpu_cells.Watch, "after", ending_after(20))
    size = Size(2, 400)
    cell = gpu_cells._cell(pair, size, gpu_cells.LOCKSTEP, 60.0)
    assert (cell.tokens, cell.complete, cell.skipped) == (40, False, "")
    assert cell.rate == cell.decoding > 0
    monkeypatch.setattr(gpu_cells.Watch, "after", ending_after(3))
    assert "no more than 3 rounds" in gpu_cells._cell(pair, size, gpu_cells.LOCKSTEP, 60.0).skipped


def test_large_shapes_are_not_asked_of_a_cpu():
    """Guards: a machine without a GPU that is brought to its knees by two large models."""
    with pytest.raises(ConfigError, match="tiny"):
        gpu_line(huge_shape="Qwen3-1.7B")


def test_targets_are_those_that_were_asked_for():
    """Guards: a target that is read off the wrong row."""
    size = Size(32, 512)
    rates = {gpu_cells.LOCKSTEP: 3300, gpu_cells.TEACHER: 5000}
    small = {gpu_cells.FAST: 150, gpu_cells.TEACHER: 100, gpu_cells.SLOW: 1}
    cells = [gpu_cells.Cell(size, row, tokens, 1.0, complete=True) for row, tokens in rates.items()]
    cells += [
        gpu_cells.Cell(Size(8, 256), row, tokens, 1.0, complete=True)
        for row, tokens in small.items()
    ]
    found = {
        (t.wanted, round(t.found, 2), t.met) for t in gpu_tables.targets(cells, {size: 4000.0})
    }
    assert found == {(3000, 3300.0, True), (0.9, 0.82, False), (1.2, 1.5, True)}
