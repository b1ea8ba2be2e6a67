"""The scheduler against pretend caches: lists of token ids that must be what the sequences say."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from optimal_sampling.engines.local.memory import KVMemory, SlotManager
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager
from optimal_sampling.engines.local.paged.page_runner import GATHER, SLOW_GATHER
from optimal_sampling.engines.local.scheduler import Limits, Scheduler, Sequence
from optimal_sampling.types import Request
from tests.engines.local.test_own_cache import OwnManager

UNIT = 4
"""Slot lengths are multiples of it."""
BYTES = (1, 2)
"""Per token, in the caches of the two contexts."""


def sequence(number, student=4, teacher=6, new=5):
    prompts = tuple(
        tuple(range(number * 1000 + c * 500, number * 1000 + c * 500 + n))
        for c, n in enumerate((student, teacher))
    )
    return Sequence(Request(str(number), 0, 0, *prompts, new), prompts)


def slots(rows, memory):
    """Two caches of slots."""
    return KVMemory(
        [
            SlotManager((c,), size, lambda n: -(-n // UNIT) * UNIT, rows)
            for c, size in enumerate(BYTES)
        ],
        memory,
    )


def pages(rows, memory):
    """Two caches of as many pages."""
    count = max(0, memory // (PAGE * sum(BYTES)) - 1)
    return KVMemory([PageManager((c,), size, count) for c, size in enumerate(BYTES)], memory)


def beside_slots(rows, memory):
    """One cache of slots, and one that grows token by token."""
    [first, _] = slots(rows, memory).managers
    return KVMemory([first, OwnManager((1,), BYTES[1])], memory)


def limits(rows=4, chunk=8, contexts=(None, None), gather=0.0):
    return Limits(rows, chunk, contexts, gather=gather)


def scheduler_of(memory=10**9, kind=slots, **options):
    bounds = limits(**options)
    return Scheduler(bounds, kind(bounds.rows, memory))


class PretendCache:
    """Slots of token lists; follows a plan as the engine does."""

    def __init__(self, contexts):
        self.slots = [{} for _ in range(contexts)]

    def follow(self, scheduler, plan):
        for source, target in plan.moves:
            for slots in self.slots:
                slots[target] = slots.get(source, [])[:]
        for context, chunks in enumerate(plan.chunks):
            for chunk in chunks:
                row = scheduler.running[chunk.row]
                kept = self.slots[context].get(chunk.row, []) if chunk.start else []
                self.slots[context][chunk.row] = kept[: chunk.start] + chunk.ids
                row.cached[context] += len(chunk.ids)

    def check(self, scheduler, plan):
        for index, row in enumerate(scheduler.running):
            for context in range(len(self.slots)):
                held = self.slots[context].get(index, [])[: row.cached[context]]
                assert held == row.tokens(context, 0, row.cached[context]), (
                    "a slot holds another sequence's tokens"
                )
                if plan.ready[index]:
                    assert row.pending(context) == 0, (
                        "a row decodes although part of its text is not cached"
                    )


def reserve(memory, plan):
    """What the engine does before a round; the budget holds at every step of it."""
    for source, target in plan.moves:
        for manager in memory.managers:
            manager.move(source, target)
    for i in memory.reservations(plan.lengths, plan.width):
        memory.managers[i].reserve(plan.lengths, plan.width)
        assert memory.held <= memory.budget
    assert all(m.held >= m.bytes_needed(plan.lengths, plan.width) for m in memory.managers)


def as_lists(plan):
    """All of a plan, comparable."""
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: np.asarray(x).tolist() if name != "chunks" else x for name, x in values.items()}


def check_foreseen(scheduler, foreseen, plan):
    """Guards: a round ahead over rows, text or memory that its own plan would not have."""
    behind = (foreseen.lengths - plan.lengths)[:, 0]
    begun = foreseen.begun(behind, ())
    assert min(behind) >= 0
    assert as_lists(dataclasses.replace(begun, width=plan.width)) == as_lists(plan)
    # it may draw more than its texts need, but not more than there is room for
    assert scheduler.memory.held <= scheduler.memory.budget
    assert all(m.has_room(foreseen.lengths, foreseen.width) for m in scheduler.memory.managers)
    for known, limit in zip(foreseen.lengths.T, scheduler.limits.context_lengths, strict=True):
        assert limit is None or max(known) + foreseen.width - 1 <= limit


def run(scheduler, sequences, width=1):
    """Serve all. The finished, in order; a token is a number of its sequence and position."""
    cache, finished, source, rounds = PretendCache(2), [], iter(sequences), 0
    foreseen, rows, done = None, None, []
    while True:
        plan = scheduler.next_round(source, width)
        if foreseen is not None and not done:
            check_foreseen(scheduler, foreseen, plan)
            assert scheduler.running == rows
        if plan is None:
            if not scheduler.waiting:
                return finished
            continue
        rounds += 1
        assert rounds < 10_000, "no progress"
        cache.follow(scheduler, plan)
        cache.check(scheduler, plan)
        assert 1 <= plan.width <= width
        reserve(scheduler.memory, plan)
        foreseen, rows = scheduler.following(plan, plan.width, width), list(scheduler.running)
        assert len(scheduler.running) <= scheduler.limits.rows
        for context in range(2):
            assert sum(len(c.ids) for c in plan.chunks[context]) <= scheduler.limits.prefill_chunk
        done = []
        for index, row in enumerate(scheduler.running):
            if not plan.ready[index]:
                continue
            first = int(row.request.id) * 10**6 + len(row.output)
            count = 1 + first % 7 % plan.width  # some drafts are rejected
            row.output.extend(range(first, first + count))
            for context in range(2):
                held = cache.slots[context][index] if row.cached[context] else []
                cache.slots[context][index] = held[: row.cached[context]] + row.tokens(
                    context, row.cached[context], row.known(context) - 1 - row.cached[context]
                )
                row.cached[context] = row.known(context) - 1
            if len(row.output) >= row.request.max_new_tokens:
                done.append(index)
        finished += [scheduler.running[i] for i in done]
        scheduler.finish(done)
        assert width > 1 or not (done and foreseen), "the limit of a text is known before"


NARROWED = [
    (1, 1, 13),
    (1, 1, 16),
    (20, 29, 19),
    (1, 1, 1),
    (1, 1, 16),
    (1, 1, 13),
    (1, 1, 1),
    (1, 1, 4),
    (1, 1, 4),
]
"""A round in which 3 tokens per row would take 740 bytes of 720: it has to be planned for 1."""
TURNED = [(30, 1, 20)] * 5 + [(1, 30, 20)] * 5
"""The second cache grows by what the first one no longer needs: together they exceed 720 bytes."""

BUDGETS = {
    slots: (10**9, 720, 1080, 1440),
    beside_slots: (10**9, 400, 700, 1000),
    pages: (10**9, 3 * PAGE * 2, 3 * PAGE * 3, 3 * PAGE * 6),
}
"""In bytes, by pressure."""
SCALE = {slots: 1, beside_slots: 1, pages: 40}
"""Tokens per token of a shape: texts of several pages."""


@example(NARROWED, 5, 14, 1, 3, slots, 0.0)
@example(TURNED, 5, 20, 1, 1, slots, 0.0)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 20)), max_size=12),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(1, 4),
    st.sampled_from([slots, pages, beside_slots]),
    st.sampled_from([0.0, 0.5]),
)
def test_everyone_is_served_once_and_caches_hold_the_right_text(
    shapes, rows, chunk, pressure, width, kind, gather
):
    """Guards: rows mixed up by moves, preemption that loses tokens, chunks that overlap,
    starvation, caches that outgrow the budget between two reshapes.
    """
    scale = SCALE[kind]
    bounds = {"rows": rows, "chunk": chunk * scale, "gather": gather}
    scheduler = scheduler_of(BUDGETS[kind][pressure], kind, **bounds)
    sequences = [
        sequence(i, student * scale, teacher * scale, new)
        for i, (student, teacher, new) in enumerate(shapes)
    ]
    finished = run(scheduler, sequences, width)
    rejected = [s for s, _ in scheduler.rejected]
    assert sorted(int(s.request.id) for s in [*finished, *rejected]) == list(range(len(shapes)))
    for s in finished:
        count = s.request.max_new_tokens
        assert s.output[:count] == [int(s.request.id) * 10**6 + i for i in range(count)]


def test_caches_shrink_before_others_grow():
    """Guards: a cache that grows while another still holds memory that it no longer needs."""
    memory = slots(1, 100 * 1 + 100 * 2 + 2)
    [first, second] = memory.managers
    for i in memory.reservations(np.array([[160, 40]]), 0):
        memory.managers[i].reserve(np.array([[160, 40]]), 0)
    assert (first.length, second.length) == (160, 40)
    assert memory.fits(np.array([[40, 120]]), 0)
    assert memory.reservations(np.array([[40, 120]]), 0) == [0, 1]
    memory.managers[0].reserve(np.array([[40, 120]]), 0)
    memory.managers[1].reserve(np.array([[40, 120]]), 0)
    assert (first.length, second.length) == (40, 120)
    assert memory.reservations(np.array([[4, 4]]), 0) == []


def test_preemption_happens_and_the_latest_gives_way():
    """Guards: a memory budget that is exceeded, and a victim that has waited longest."""
    scheduler = scheduler_of(3 * 2 * 16 + 10)
    sequences = [sequence(i, 2, 2, 14) for i in range(3)]
    finished = run(scheduler, sequences)
    assert scheduler.preemptions > 0
    assert [s.request.id for s in finished] == ["0", "1", "2"]


def test_a_request_that_no_budget_holds_is_rejected_with_both_figures():
    """Guards: an endless loop of admission and preemption of one sequence that can never fit."""
    scheduler = scheduler_of(100)
    assert run(scheduler, [sequence(0, 60, 60, 5), sequence(1, 2, 2, 2)]) != []
    [(rejected, reason)] = scheduler.rejected
    assert rejected.request.id == "0"
    assert "KV cache" in reason
    assert "budget" in reason


def test_a_long_prompt_is_cached_in_chunks_while_others_decode():
    """Guards: a long prompt that stalls every other row, or decodes before it is cached."""
    scheduler = scheduler_of(chunk=8)
    source = iter([sequence(0, 3, 3, 50), sequence(1, 40, 40, 2)])
    cache = PretendCache(2)
    ready = []
    for _ in range(8):
        plan = scheduler.next_round(source)
        cache.follow(scheduler, plan)
        ready.append(plan.ready)
        scheduler.running[0].output.append(7)
        scheduler.running[0].cached = (
            [s + 1 for s in scheduler.running[0].cached] if plan.ready[0] else [0, 0]
        )
    assert ready[0] == [True, False]
    assert [True, True] in ready
    assert all(first for first, _ in ready)


@pytest.mark.parametrize(("limit", "width"), [(None, 8), (20, 8), (12, 3), (10, 1)])
def test_width_stays_within_the_context(limit, width):
    """Guards: feeding positions beyond the model's last one."""
    scheduler = scheduler_of(chunk=100, contexts=(limit, None))
    assert scheduler.next_round(iter([sequence(0, 10, 6, 30)]), 8).width == width


@pytest.mark.parametrize(("positions", "width"), [(10**9, 8), (16, 5), (9, 3), (3, 1), (1, 1)])
def test_width_stays_within_the_logits_that_can_be_held(positions, width):
    """Guards: drafts that multiply the logits of a large batch until memory is full."""
    bounded = dataclasses.replace(limits(chunk=100), positions=positions)
    scheduler = Scheduler(bounded, slots(bounded.rows, 10**9))
    assert scheduler.next_round(iter([sequence(i, 4, 4, 30) for i in range(3)]), 8).width == width


def test_a_sequence_in_lockstep_keeps_the_round_narrow():
    """Guards: drafts for a text whose caches a draft has spoiled before."""
    scheduler = scheduler_of(chunk=100)
    spoiled = sequence(0, 4, 4, 30)
    spoiled.lockstep = True
    assert scheduler.next_round(iter([spoiled, sequence(1, 4, 4, 30)]), 8).width == 1


def test_requests_are_pulled_only_as_there_is_room():
    """Guards: reading an endless stream of requests into memory."""
    pulled = []

    def endless():
        for i in range(10**9):
            pulled.append(i)
            yield sequence(i)

    scheduler_of(rows=2, chunk=100).next_round(endless())
    assert len(pulled) <= 3


def test_a_batch_far_beyond_the_budget_runs_in_parts():
    """Guards: a batch size that runs out of memory."""
    scheduler = scheduler_of(3 * 16 * 20, rows=4096, chunk=10**6)
    assert len(run(scheduler, [sequence(i, 4, 4, 6) for i in range(300)])) == 300


def cost_of(gather, slow=8.0, rows=32, mean=300):
    """Duration of many texts of uneven lengths, in rounds without prompts, and the mixed rounds.

    A round that reads prompts takes `slow` times as long.
    """
    scheduler = scheduler_of(rows=rows, chunk=10**6, gather=gather)
    lengths = random.Random(0)
    source = (sequence(i, 4, 4, lengths.randint(1, 2 * mean)) for i in range(8 * rows))
    plain = mixed = 0
    while (plan := scheduler.next_round(source)) is not None:
        mixed += any(plan.chunks)
        plain += not any(plan.chunks)
        done = []
        for index, row in enumerate(scheduler.running):
            row.output.append(7)
            row.cached = [row.known(0) - 1, row.known(1) - 1]
            if len(row.output) == row.request.max_new_tokens:
                done.append(index)
        scheduler.finish(done)
    return slow * mixed + plain, mixed


def test_gathered_admissions_save_slow_rounds():
    """Guards: a slow round for every row that ends; rows that wait longer than that saves."""
    at_once, many = cost_of(0.0)
    gathered, few = cost_of(SLOW_GATHER)
    assert few * 3 < many
    assert gathered < 0.8 * at_once


@pytest.mark.parametrize("slow", [1.5, 2.0])
def test_recorded_rounds_with_prompts_need_little_gathering(slow):
    """Guards: rows that wait for others where a round with prompts costs half a round, or one."""
    recorded, _ = cost_of(GATHER, slow)
    assert recorded < cost_of(0.0, slow)[0]
    assert recorded < cost_of(SLOW_GATHER, slow)[0]
    assert cost_of(SLOW_GATHER)[0] < cost_of(GATHER)[0]


def test_a_batch_that_memory_bounds_gathers_by_what_it_holds():
    """Guards: a share of rows that memory never holds, for which nothing is ever admitted."""
    scheduler = scheduler_of(4 * 3 * 16 + 10, rows=64, chunk=100, gather=0.5)
    source = iter([sequence(i, 4, 4, 12) for i in range(20)])
    running = []
    for _ in range(6):
        scheduler.next_round(source)
        running.append(len(scheduler.running))
        for row in scheduler.running:
            row.cached = [3, 3]
        scheduler.finish([0])
    assert running == [8, 7, 6, 5, 8, 7]


def test_no_round_is_foreseen_past_a_switch_of_rotary_factors():
    """Guards: a text that goes on with the short factors, as its switch fell into a round ahead."""
    bounded = dataclasses.replace(limits(chunk=100), rope_switches=(12, None))
    scheduler = Scheduler(bounded, slots(bounded.rows, 10**9))
    source, foreseen = iter([sequence(0, 10, 6, 30)]), []
    for _ in range(5):
        plan = scheduler.next_round(source)
        [row] = scheduler.running
        for i in scheduler.memory.reservations(plan.lengths, UNIT):
            scheduler.memory.managers[i].reserve(plan.lengths, UNIT)
        foreseen.append((int(plan.lengths[0, 0]), scheduler.following(plan) is not None))
        row.output.append(7)
        row.cached = [row.known(0) - 1, row.known(1) - 1]
    assert foreseen == [(10, False), (11, True), (12, False), (13, False), (14, True)]


def test_no_round_with_drafts_is_foreseen_across_a_switch_of_rotary_factors():
    """Guards: a text that may be on either side of its switch when the round starts."""
    bounded = dataclasses.replace(limits(chunk=100), rope_switches=(40, None))
    foreseen = []
    for known in (20, 32, 33, 36, 37, 40, 41):
        scheduler = Scheduler(bounded, slots(bounded.rows, 10**9))
        [row] = [sequence(0, known, 6, 30)]
        row.cached, row.long = [known - 1, 5], [known > 40, False]
        plan = scheduler.next_round(iter([row]), 4)
        for i in scheduler.memory.reservations(plan.lengths, 8):
            scheduler.memory.managers[i].reserve(plan.lengths, 8)
        plan = scheduler.following(plan, plan.width, 4)
        foreseen.append(plan and plan.width)
    assert foreseen == [4, 4, 4, 1, None, None, 4]


def test_a_request_that_arrives_ends_the_rounds_ahead():
    """Guards: a served request that waits until one of those before it ends."""
    scheduler = Scheduler(limits(chunk=100), slots(4, 10**9))
    source = iter([sequence(0, 4, 4, 12), None, None, sequence(1, 4, 4, 12), None])
    scheduler.next_round(source)
    assert [scheduler.has_arrived(source) for _ in range(3)] == [False, True, True]
    assert len(scheduler.running) == 1
    scheduler.next_round(source)
    assert len(scheduler.running) == 2
    assert not scheduler.has_arrived(source)


def test_nothing_is_asked_for_while_rows_are_full():
    """Guards: requests that are taken from their source long before there is a place for them."""
    scheduler = Scheduler(dataclasses.replace(limits(chunk=100), rows=2), slots(2, 10**9))
    source = iter([sequence(i, 4, 4, 12) for i in range(4)])
    scheduler.next_round(source)
    assert not scheduler.has_arrived(source)
    assert len(list(source)) == 2
