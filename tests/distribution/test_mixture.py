"""The seam `solve`, `draw`, `log_q`, `trace_of`, and its three kinds of rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    draft,
    draw,
    gumbel,
    keys_tensor,
    log_q,
    make_pair,
    mixture,
    single_step,
    solve,
    solve_single,
    step,
    trace_of,
)
from optimal_sampling.distribution.naive import naive_step
from optimal_sampling.types import ALPHA_METHODS, TRACE_FIELDS, TRACE_TABLE, TraceField

CONFIG = MixtureConfig(alpha_min=0.1)


def batch(rows, vocab, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=g) * 3
    teacher = student + torch.randn(rows, vocab, generator=g)
    position = torch.arange(rows)
    return student, teacher, gumbel(keys_tensor(range(rows)), position, vocab), position


@pytest.mark.parametrize("vocab", [40, 5000])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, top_k=5), replace(CONFIG, top_p=0.7)])
def test_the_parts_make_a_step(vocab, config):
    """Guards: an engine that composes the parts itself and draws from another q than `step`."""
    student, teacher, noise, position = batch(6, vocab)
    student[4, 0] = math.nan
    whole = step(student, teacher, noise, position, config, keep_log_q=True)
    solved = solve(make_pair(student, teacher, config), position, config)
    token, drawn_log_q = draw(solved, noise)
    trace = trace_of(solved, token, drawn_log_q)
    assert torch.equal(token, whole.token)
    torch.testing.assert_close(trace, whole.trace, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(log_q(solved), whole.log_q, equal_nan=True)


@pytest.mark.parametrize("vocab", [40, 5000])
def test_tokens_drawn_elsewhere_are_traced_later(vocab):
    """Guards: a solved value that takes another step's numbers: vLLM draws after later passes."""
    student, teacher, noise, position = batch(6, vocab)
    student[1, 3], teacher[2, 5], student[3, ::2], teacher[3, 1::2] = [-math.inf] * 4
    solved = solve(make_pair(student, teacher, CONFIG), position, CONFIG)
    token, _ = draw(solved, noise)
    solve(make_pair(teacher, student, CONFIG), position, CONFIG)
    want = step(student, teacher, noise, position, CONFIG)
    torch.testing.assert_close(trace_of(solved, token), want.trace, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", [lambda solved, noise: draw(solved, noise), lambda s, _: log_q(s)])
def test_a_stale_pair_is_refused(use):
    """Guards: a draw from the logits of a newer step that has the same buffers."""
    student, teacher, noise, position = batch(3, 5000)
    solved = solve(make_pair(student, teacher, CONFIG), position, CONFIG)
    make_pair(teacher, student, CONFIG)
    with pytest.raises(RuntimeError, match="newer pair"):
        use(solved, noise)


@pytest.mark.parametrize("vocab", [40, 5000])
def test_draws_do_not_depend_on_the_last_alpha_seen(vocab):
    """Guards: log q, draw or entropy at whatever alpha was evaluated last."""
    student, teacher, noise, position = batch(3, vocab)
    pair = make_pair(student, teacher, CONFIG)
    solved = solve(pair, position, CONFIG)
    before = draw(solved, noise)[0], log_q(solved), solved.moments.entropy
    pair.moments(pair.full(0.9))
    after = draw(solved, noise)[0], log_q(solved), solved.moments.entropy
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("masked", [-math.inf, 0.0])
def test_a_pair_is_solved_once(masked):
    """Guards: a second solve on rows whose support is no longer the common one."""
    student, teacher, _, position = batch(3, 40)
    student[0, 1] = masked
    pair = make_pair(student, teacher, CONFIG)
    solve(pair, position, CONFIG)
    with pytest.raises(RuntimeError, match="solved already"):
        solve(pair, position, CONFIG)


@pytest.mark.parametrize("other", [{"temperature": 2.0}, {"teacher_support_top_k": 3}])
def test_a_pair_is_solved_with_its_own_mixture(other):
    """Guards: q at the pair's temperature and support under another configuration, silently."""
    student, teacher, _, position = batch(3, 40)
    pair = make_pair(student, teacher, CONFIG)
    with pytest.raises(ValueError, match=next(iter(other))):
        solve(pair, position, replace(CONFIG, **other))


def test_an_unknown_role_is_refused():
    """Guards: a misspelt role that is traced as the student."""
    with pytest.raises(ValueError, match="'Teacher'"):
        solve_single(batch(1, 9)[0], CONFIG, "Teacher")


@pytest.mark.parametrize("vocab", [40, 5000])
@pytest.mark.parametrize("cut", [lambda x: x[:, :-1], lambda x: x[:-1]])
@pytest.mark.parametrize("use", [lambda *x: step(*x, CONFIG), lambda *x: make_pair(*x[:2], CONFIG)])
def test_logits_of_unequal_shapes_are_refused(vocab, cut, use):
    """Guards: torch that resizes a buffer, and rows that are left out."""
    student, teacher, noise, position = batch(3, vocab)
    with pytest.raises(ValueError, match=rf"\(3, {vocab}\) and \("):
        use(student, cut(teacher), noise, position)


@pytest.mark.parametrize("vocab", [2, 5000])
@pytest.mark.parametrize("method", ["reverse_kl_symmetry", "kl_symmetry"])
@pytest.mark.parametrize("kind", ["equal", "disjoint", "bad"])
def test_the_parts_do_not_warn(vocab, method, kind):
    """Guards: warnings of 0/0 on ordinary rows where the parts are used without `step`."""
    student = torch.zeros(1, vocab)
    teacher = student.clone()
    if kind == "disjoint":
        student[:, 1:], teacher[:, :1] = -math.inf, -math.inf
    if kind == "bad":
        student[0, 0], teacher[:] = math.inf, -math.inf
    config = MixtureConfig(alpha_method=method)
    noise = torch.zeros_like(student)
    solved = solve(make_pair(student, teacher, config), torch.zeros(1, dtype=torch.int64), config)
    log_q(solved)
    trace_of(solved, draw(solved, noise)[0])


def test_ess_is_left_out_on_request():
    """Guards: a pass over the vocabulary for numbers that nobody asked for, or zeros for them."""
    student, teacher, noise, position = batch(3, 40)
    pair = make_pair(student, teacher, CONFIG)
    pair.ess = None
    solved = solve(pair, position, CONFIG, ess=False)
    trace = dict(zip(TRACE_FIELDS, trace_of(solved, draw(solved, noise)[0]).T, strict=True))
    assert trace.pop("ess_student").isnan().all()
    assert trace.pop("ess_teacher").isnan().all()
    assert not torch.stack([*trace.values()]).isnan().any()


def test_a_new_field_is_one_entry(monkeypatch):
    """Guards: columns that are numbered somewhere beside the table."""
    ratio = TraceField("ess_ratio", "", lambda of: of["ess_teacher"] / of["ess_student"])
    monkeypatch.setattr(mixture, "TRACE_TABLE", (ratio, *TRACE_TABLE))
    student, teacher, noise, position = batch(3, 40)
    trace = step(student, teacher, noise, position, CONFIG).trace
    names = ("ess_ratio", *TRACE_FIELDS)
    ess = (trace[:, names.index(f"ess_{role}")] for role in ("teacher", "student"))
    torch.testing.assert_close(trace[:, 0], torch.div(*ess))


def test_one_model_alone():
    """Guards: a mode without a mixture that has noise, temperature or truncation of its own."""
    student, _, noise, position = batch(5, 60)
    student[3] = -math.inf
    config = MixtureConfig(temperature=0.7, alpha_method="fixed", fixed_alpha=1.0, top_p=0.8)
    alone = single_step(student, noise, config, "teacher")
    mixed = step(student, student, noise, position, config)
    assert torch.equal(alone.token, mixed.token)
    assert alone.bad_teacher.tolist() == [False] * 3 + [True, False]
    assert not alone.bad_student.any()
    for name in ("alpha", "log_p_teacher", "log_q"):
        column = TRACE_FIELDS.index(name)
        torch.testing.assert_close(alone.trace[:, column], mixed.trace[:, column], equal_nan=True)
    assert alone.trace[:, TRACE_FIELDS.index("log_p_student")].isnan().all()
    solved = solve_single(student, config, "teacher")
    column = TRACE_FIELDS.index("log_q")
    before_truncation = trace_of(solved, alone.token)[:, column]
    want = alone.trace[:, TRACE_FIELDS.index("log_p_teacher")]
    torch.testing.assert_close(before_truncation, want, equal_nan=True)


# Users of the seam: full rows are those above


@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_the_union_of_two_whole_lists_is_the_full_row(method):
    """Guards: rows of given ids, in any order, mixed or drawn otherwise than full rows."""
    student, teacher, noise, position = batch(4, 50)
    config = MixtureConfig(alpha_method=method)
    ids = torch.stack([torch.randperm(50) for _ in range(4)])
    noise_of_ids = gumbel(keys_tensor(range(4)), position, ids)
    full = step(student, teacher, noise, position, config, keep_log_q=True)
    listed = step(
        student.gather(-1, ids),
        teacher.gather(-1, ids),
        noise_of_ids,
        position,
        config,
        keep_log_q=True,
    )
    assert torch.equal(ids.gather(-1, listed.token[:, None])[:, 0], full.token)
    torch.testing.assert_close(
        torch.empty_like(full.log_q).scatter_(-1, ids, listed.log_q), full.log_q
    )
    torch.testing.assert_close(listed.trace, full.trace, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_a_union_of_top_k_lists_with_a_tail():
    """Guards: a tail that has no mass, or noise by place in the list rather than by token id."""
    student, teacher, _, position = batch(4, 400)
    keys = keys_tensor(range(4))
    lists = [x.topk(20).indices for x in (student, teacher)]
    for row in range(4):
        ids = torch.cat([x[row] for x in lists]).unique()
        outside = torch.ones(400, dtype=torch.bool).index_fill(0, ids, False)
        rows = [
            torch.cat([x[row, ids], x[row, outside].logsumexp(-1, keepdim=True)])[None]
            for x in (student, teacher)
        ]
        tail = torch.tensor([400])
        noise = gumbel(keys[row : row + 1], position[row : row + 1], torch.cat([ids, tail])[None])
        got = step(*rows, noise, position[row : row + 1], CONFIG, keep_log_q=True)
        want = naive_step(*(x[0].tolist() for x in rows), noise[0].tolist(), row, CONFIG)
        assert got.token.item() == want.token
        torch.testing.assert_close(got.log_q[0], torch.tensor(want.log_drawn), atol=2e-5, rtol=0)
        assert torch.equal(
            noise[0, :-1], gumbel(keys[row : row + 1], position[row : row + 1], 400)[0, ids]
        )


def test_bytes_are_a_vocabulary_of_257():
    """Guards: sizes that are no multiple of a vector, and an end symbol that nobody draws."""
    student, teacher, noise, position = batch(3, 257)
    student[0, 256] = teacher[0, 256] = 14.0
    result = step(student, teacher, noise, position, CONFIG)
    assert result.token[0] == 256
    assert result.token[0] == draft(student, noise, CONFIG)[0]
    for row in range(3):
        rows = (x[row].tolist() for x in (student, teacher, noise))
        want = naive_step(*rows, row, CONFIG)
        assert result.token[row] == want.token
        got = dict(zip(TRACE_FIELDS, result.trace[row].tolist(), strict=True))
        assert got == pytest.approx(want.trace, abs=2e-5)


@pytest.mark.parametrize("vocab", [60, 6007])
def test_inference_mode_leaves_nothing_behind(vocab):
    """Guards: buffers made in an engine's inference mode, which nobody else can write to."""
    student, teacher, noise, position = batch(3, vocab)
    student[0, 1] = -math.inf
    with torch.inference_mode():
        inside = step(student, teacher, noise, position, CONFIG).pack()
    assert torch.equal(step(student, teacher, noise, position, CONFIG).pack(), inside)
