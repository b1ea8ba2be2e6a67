"""Rounds with drafts queued before the tokens of the one before are known: the same texts."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from optimal_sampling.bench.instruments import MeasuredEngine
from optimal_sampling.distribution import Drawn
from optimal_sampling.engines.device import Overlap
from optimal_sampling.engines.local import round as round_module
from optimal_sampling.engines.local.drafting import DraftPolicy, FixedDrafts
from optimal_sampling.engines.local.paged.page_cache import Batch, lay_out
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager
from optimal_sampling.engines.local.round import SampledRound
from optimal_sampling.engines.local.round_noise import RoundNoise
from optimal_sampling.types import Request
from tests.engines.conformance import by_key
from tests.engines.local.conftest import tiny_model, vocabulary
from tests.engines.local.paged.test_paged_engine import paged_engine
from tests.engines.local.paged.test_running_ahead import outcome, requests_of, same_as_in_turn

pytestmark = pytest.mark.usefixtures("flash_on_cpu")


@pytest.fixture(scope="module")
def models():
    """Alike enough for some drafts to be accepted, and some not."""
    teacher = tiny_model(2, layers=2)
    student = tiny_model(2, layers=2)
    for i, parameter in enumerate(student.parameters()):
        generator = torch.Generator().manual_seed(i)
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return student, teacher


@pytest.fixture(params=["in turn", "at once"])
def order(request, monkeypatch):
    """How both models run; at once: by the path of a GPU."""
    if request.param == "at once":
        monkeypatch.setattr(round_module, "Overlap", AtOnce)


class AtOnce(Overlap):
    """One queue that takes the work of two."""

    def __init__(self, device):
        super().__init__(device)
        self.works = True


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("draft_tokens", [1, 2, 4, 8])
def test_stops_limits_and_admissions_change_nothing(models, draft_tokens):
    """Guards: positions, noise or a last token that are not those after the accepted drafts."""
    for batch_size, recorded in ((1, True), (3, False), (16, True)):
        options = {"batch_size": batch_size, "recorded": recorded, "draft_tokens": draft_tokens}
        engine = same_as_in_turn(models, requests_of(), **options)
        assert 0 < engine.draft_counts.accepted < engine.draft_counts.drafted


def test_most_rounds_of_long_texts_are_queued_ahead(models):
    """Guards: rounds that wait for the host although nothing but their tokens is open."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    options = {"vocab": vocab, "batch_size": 4, "draft_tokens": 3}
    engine = same_as_in_turn(models, requests_of(4, new=(60,)), **options)
    counts = engine.draft_counts
    assert counts.accepted > 0
    assert counts.ahead > 0.8 * counts.rounds


@pytest.mark.parametrize("draft_tokens", [2, 8])
def test_preemption_and_growth_of_pages(draft_tokens):
    """Guards: tokens of two rounds that lie behind a row's pages, in those of another row.

    Texts cross the end of a page, and all of them do not fit at once.
    """
    changes = {"max_position_embeddings": 3000}
    models = [tiny_model(seed, layers=1, **changes) for seed in (1, 1)]
    vocab = dataclasses.replace(vocabulary(context=3000), stop_ids=frozenset())
    lengths = (230, 242, 254, 490, 3)
    requests = [Request(str(n), 0, 0, tuple([2, 3, 5] * n)[:n], (1, 4), 30) for n in lengths]
    per_token = sum(r.bytes_per_token for r in paged_engine(*models).pair.runners.values())
    for pages, preempts in ((5, True), (40, False)):
        options = {
            "kv_memory_gib": (pages + 1.5) * PAGE * per_token / 2**30,
            "draft_tokens": draft_tokens,
            "batch_size": 5,
            "vocab": vocab,
        }
        engine = same_as_in_turn(models, requests, **options)
        assert (engine.loop.scheduler.preemptions > 0) == preempts


def test_the_end_of_a_context_inside_a_round(models):
    """Guards: positions that the model does not have, in a round after the longest case."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    requests = requests_of(4, new=(200,))
    engine = same_as_in_turn(models, requests, vocab=vocab, batch_size=4, draft_tokens=4)
    done = by_key(engine.generate(requests))
    assert all(len(c.token_ids) > 70 and c.finish_reason == "length" for c in done.values())


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_bad_logits_end_their_text_only(models, draft_tokens):
    """Guards: NaN of a row with bad logits in the round ahead, or in a row that is redone."""
    broken = tiny_model(2, layers=2)
    broken.model.embed_tokens.weight.data[11] = torch.nan
    bad = [Request(f"bad {i}", 0, 0, (1, 2), (1, 11, 2), 8) for i in range(2)]
    others = requests_of(8, new=(30, 20, 9))
    requests = [*others[:4], bad[0], *others[4:6], bad[1], *others[6:]]
    for batch_size in (1, 3):
        options = {"batch_size": batch_size, "draft_tokens": draft_tokens}
        engine = same_as_in_turn((models[0], broken), requests, **options)
        done = by_key(engine.generate(requests))
        assert {done[r.id, 0].finish_reason for r in bad} == {"error"}
        assert "stop" in {c.finish_reason for c in done.values()}


def test_a_row_that_a_rejected_draft_has_spoilt(models):
    """Guards: a text that ends with an error because of a draft that is not in it."""
    broken = tiny_model(2, layers=2)
    broken.model.embed_tokens.weight.data[7] = torch.nan
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    requests = requests_of(8, new=(30, 20))
    plain = paged_engine(models[0], broken, vocab=vocab, batch_size=4, draft_tokens=0)
    expected = outcome(plain, requests)
    options = {"vocab": vocab, "batch_size": 4, "draft_tokens": 4}
    engine = same_as_in_turn((models[0], broken), requests, **options)
    assert outcome(engine, requests) == expected
    assert any(sequence.lockstep for sequence in seen_rows(engine, requests))


def seen_rows(engine, requests):
    """Every sequence that ran, after the run."""
    rows = []
    for _ in engine.generate(requests):
        rows += engine.loop.scheduler.running
    return rows


@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
def test_emulated_acceptance_is_counted_where_it_is_made(models, acceptance):
    """Guards: a round that goes on after the tokens that were drawn before they were replaced."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    requests, found = requests_of(5, new=(40, 25)), []
    for ahead in (False, True):
        base = paged_engine(*models, ahead=ahead, vocab=vocab, batch_size=4, draft_tokens=4)
        engine = MeasuredEngine(base.pair, base.mixture, base.options, base.vocabulary)
        engine.acceptance = acceptance
        found.append((outcome(engine, requests), engine.draft_counts.ahead))
    assert found[0][0] == found[1][0]
    assert [ahead > 0 for _, ahead in found] == [False, True]


@pytest.mark.usefixtures("order")
def test_auto_queues_rounds_with_drafts_ahead(models):
    """Guards: a width that follows from tokens that the host does not have yet."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    requests = requests_of(4, new=(70, 50))
    options = {"vocab": vocab, "batch_size": 4}
    expected = outcome(paged_engine(*models, draft_tokens=0, **options), requests)
    engine = paged_engine(*models, ahead=True, draft_tokens="auto", **options)
    engine._policy = Widths
    assert outcome(engine, requests) == expected
    assert engine.draft_counts.ahead > engine.draft_counts.rounds / 2
    assert engine.draft_counts.accepted > 0


class Widths(DraftPolicy):
    """Another width, or a plain round, every time."""

    def __init__(self):
        super().__init__()
        self.turn = 0

    def forced(self):
        return (5, 2, 9, 1, 3)[self.turn % 5]

    def plain_next(self, rows):
        self.turn += 1
        return self.turn % 4 == 0


class Costs(FixedDrafts):
    """Keeps what it is told of rounds."""

    def __init__(self, count):
        super().__init__(count)
        self.seconds = []

    def observe_round(self, width, rows, step, verify, rest):
        self.seconds.append(step + verify + rest)


def test_the_seconds_of_rounds_do_not_overlap(models):
    """Guards: a round's seconds that begin when it was queued, in the round before."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    engine = paged_engine(*models, ahead=True, vocab=vocab, batch_size=4, draft_tokens=3)
    engine._policy = lambda: Costs(3)
    started, slept = time.perf_counter(), 0.0
    for _ in engine.generate(requests_of(4, new=(50, 63, 70, 41))):
        before = time.perf_counter()
        time.sleep(0.2)
        slept += time.perf_counter() - before
    seconds = engine.loop.policy.seconds
    assert 0 < sum(seconds) <= time.perf_counter() - started - slept
    assert len(seconds) > engine.draft_counts.rounds / 2


# what has to be the same on a device as on the host


def sampled_round(tokens, drafts, device="cpu"):
    """A round of these tokens, at indices 10, 20, ... of their completions."""
    rows = len(drafts)
    noise = RoundNoise(
        torch.arange(rows, device=device), torch.arange(1, rows + 1, device=device) * 10, 3, 50
    )
    drawn = torch.tensor(tokens, device=device).flatten()
    step = Drawn(token=drawn, trace=None, bad_student=None, bad_teacher=None)
    return SampledRound(
        drafts=torch.tensor(drafts, device=device), logits=[], step=step, noise=noise,
        confidences=[], stopwatch=None, settled=True,
    )  # fmt: skip


def test_what_is_carried_over():
    """Guards: drafts that are counted after the first that was rejected."""
    tokens = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    drafts = [[1, 2], [9, 2], [1, 9], [9, 9]]
    carried = sampled_round(tokens, drafts).carried()
    assert carried.last.tolist() == [3, 1, 2, 1]
    assert carried.behind.tolist() == [0, 2, 1, 2]
    assert carried.first.tolist() == [13, 21, 32, 41]


def test_a_batch_set_back_is_that_of_shorter_rows():
    """Guards: an index of the cache or a number of keys that stays that of the longest case."""
    manager = PageManager((0,), 1, 20)
    manager.reserve(np.array([[40], [300], [20]]), 8)
    start, behind = np.array([41, 300, 25, 0]), np.array([0, 3, 2, 0])
    longest, shape = lay_out(manager, start, 4, [3], ())
    expected, _ = lay_out(manager, start - behind, 4, [3], ())
    batch = Batch(shape, torch.zeros(16), torch.from_numpy(longest))
    batch.set_back(torch.from_numpy(behind[:3]))
    assert batch.numbers.tolist() == expected.tolist()


def test_nothing_carried_over_is_read_by_the_host():
    """Guards: a round ahead that waits for the GPU; tensors without data cannot be read."""
    sampled = sampled_round([[1, 2, 3], [1, 2, 3]], [[1, 2], [9, 2]], device="meta")
    carried = sampled.carried()
    noise = sampled.noise.following(carried.first, 3)
    assert noise.positions(3).shape == (2, 3)
    manager = PageManager((0,), 1, 20)
    manager.reserve(np.array([[40], [300]]), 8)
    numbers, shape = lay_out(manager, np.array([41, 300]), 3, (), ())
    batch = Batch(shape, torch.zeros(6, device="meta"), torch.from_numpy(numbers).to("meta"))
    batch.set_back(carried.behind)
