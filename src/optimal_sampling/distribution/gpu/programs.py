"""The GPU programs behind `launch`, in Triton. Imported only where Triton is installed and used.

A step is these launches, where a program takes one row or one piece of it:

    survey    [rows, pieces]  with a support by min-p: log Z of both models, the teacher's largest
    restrict  [rows]          and the least logit of the teacher that belongs to it
    measure   [rows, pieces]  log Z of both models, their common support, F' at the first alpha
    refine    [rows, pieces]  F' at the next alpha, of rows whose alpha is not found yet; repeated
    solve     [rows]          alpha; by further passes over the row where these are not enough
    mix       [rows, pieces]  the sums of q at alpha, and the largest log q + noise
    finish    [rows]          the token and its diagnostics

So a row is read twice, once more with a support, and once more for every alpha that its solver
evaluates beyond the first. What is not in the support is loaded as -inf.
Sums are taken in float32, lane by lane and relative to the largest term so far; a few neighbouring
lanes are added up in float32, then threads and pieces in float64. The pieces depend on the
vocabulary alone: a row's result has the same bits whatever rows are beside it.

Names and mathematics are those of `pair`, `solver`, `methods` and `mixture`.
"""

# mypy: ignore-errors
# ruff: noqa: D103, RET505
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language import constexpr

from optimal_sampling.distribution.gpu.launch import COLUMNS, LANES, TRACED
from optimal_sampling.types import TRACE_FIELDS

__all__ = [
    "Batch",
    "Noise",
    "Outputs",
    "Settings",
    "Work",
    "choose",
    "draft",
    "finish",
    "measure",
    "mix",
    "refine",
    "restrict",
    "solve",
    "survey",
]


class Batch(NamedTuple):
    """Both models' logits: pointers to the first row, or to one; and the sizes of a row."""

    student: object
    teacher: object
    student_stride: object
    teacher_stride: object
    vocab: object
    pieces: object
    scale: object
    """1 / temperature."""
    support: object
    """A tuple: what `restrict` leaves of the first row, or of one; empty: nothing is left out.

    Triton 3.6 returns no None from a function.
    """


class Noise(NamedTuple):
    """A tensor of noise with its stride, or scrambled ids with keys and positions."""

    table: object
    stride: object
    keys: object
    position: object


class Settings(NamedTuple):
    """What a mixture says, as floats."""

    first: object
    """The first two alphas to evaluate; the second negative if there is one only."""
    second: object
    low: object
    """The bounds to solve in."""
    high: object
    alpha_min: object
    alpha_max: object
    start: object
    """alpha at the first token, in the end, and the token from which on."""
    end: object
    tokens: object
    mirror: object
    force_first: object


class Work(NamedTuple):
    """What the launches up to `solve` leave for one another."""

    measured: object
    """[rows, pieces, COLUMNS] of `measure`."""
    searched: object
    """[passes, rows, COLUMNS] of `refine`: the search for alpha, with the alpha of this pass."""
    refined: object
    """[passes, rows, pieces, COLUMNS] of `refine`: the sums at it."""


class Outputs(NamedTuple):
    """What `finish` writes."""

    token: object
    trace: object
    bad_student: object
    bad_teacher: object


class Origins(NamedTuple):
    """Numbers near the largest logit of each model, which its logits are taken relative to."""

    at_student: object
    at_teacher: object


class Known(NamedTuple):
    """What `solve` takes from the sums of `measure`; begins as Origins does."""

    at_student: object
    """The largest logits, which both models are relative to here and in `mix`."""
    at_teacher: object
    log_z_student: object
    log_z_teacher: object
    bad_student: object
    bad_teacher: object
    disjoint: object
    """Whether there is no token that both models have; one that only one of them has."""
    only_student: object
    only_teacher: object
    rootless: object
    """Whether the row is bad or disjoint, so that no alpha is to be solved for."""
    gap: object
    """log Z of the teacher less the student's; the same in the sums of `measure`."""
    head_gap: object


class Search(NamedTuple):
    """The search for the root of F'; begins as Origins does."""

    at_student: object
    at_teacher: object
    gap: object
    alpha: object
    """The latest, and F', F'' and F''' there."""
    slope: object
    curvature: object
    third: object
    left: object
    right: object
    done: object


class Sums(NamedTuple):
    """Sums of w = exp(x - top) and of w d, w d^2 and w d^3, with `top` the largest x so far."""

    top: object
    w: object
    w_d: object
    w_dd: object
    w_ddd: object


class Pieces(NamedTuple):
    """What a launch left for every piece of a row: pointers to the first columns; whether it is."""

    first: object
    inside: object


class Trace(NamedTuple):
    """The fields of one row, and what makes them NaN where it is bad: NaN, else 0."""

    fields: object
    nan: object


# Columns of what the launches leave for one another, per row and piece. Of Sums, the first column:
# `top` and the sums up to some power of d follow one another.

_COLUMNS = constexpr(COLUMNS)

# of `measure`
_STUDENT = constexpr(0)  # to the first power
_TEACHER = constexpr(3)
_MIXTURE = constexpr(6)  # to the third
_HEAD_STUDENT, _HEAD_TEACHER, _SHARED, _MOST_D, _LEAST_D = map(constexpr, range(11, 16))

# of `survey`: _STUDENT, _TEACHER and the heads as of `measure`, without a power
_TOP_TEACHER = constexpr(13)

# of `restrict`, where a row has one piece: the least logit, and log Z without the support
_FLOOR, _WHOLE_STUDENT, _WHOLE_TEACHER, _SPOILT_STUDENT, _SPOILT_TEACHER = map(constexpr, range(5))

# of `refine`: the search of a row, in order of its fields; of its pieces, sums to the third power
_SEARCH = constexpr(len(Search._fields))
_REFINED = constexpr(0)

# of `solve`, where a row has one piece
(
    _ALPHA,
    _CLAMPED,
    _AT_STUDENT,
    _AT_TEACHER,
    _LOG_Z_STUDENT,
    _LOG_Z_TEACHER,
    _BAD_STUDENT,
    _BAD_TEACHER,
    _NO_STUDENT,
    _NO_TEACHER,
    _FALLBACK,
    _MASS_STUDENT,  # log p(S) of the support; 0 without one
    _MASS_TEACHER,
) = map(constexpr, range(13))

# of `mix`; the last two of `draft` too
_Q = constexpr(0)  # to the second power
_SQUARES_STUDENT = constexpr(4)  # no power
_SQUARES_TEACHER = constexpr(6)
_Q_X, _HIGHEST, _BEST_ID = map(constexpr, range(8, 11))

# of the trace
(
    _TRACE_ALPHA,
    _TRACE_CLAMPED,
    _TRACE_KL_STUDENT,
    _TRACE_KL_TEACHER,
    _TRACE_ESS_STUDENT,
    _TRACE_ESS_TEACHER,
    _TRACE_ENTROPY,
    _TRACE_LOG_P_STUDENT,
    _TRACE_LOG_P_TEACHER,
    _TRACE_LOG_Q,
    _TRACE_FALLBACK,
    _TRACE_CURVATURE,
    _TRACE_VETOED,
    _TRACE_KL_STUDENT_RESTRICTED,
    _TRACE_KL_TEACHER_RESTRICTED,
    _TRACE_LOG_P_STUDENT_RESTRICTED,
) = (constexpr(TRACE_FIELDS.index(name)) for name in TRACED)
_TRACE_WIDTH = constexpr(len(TRACE_FIELDS))

_LANES = constexpr(LANES)
_INF = constexpr(float("inf"))
_NO_MAXIMUM = constexpr(-1e18)  # below every score
# stands for -inf: its multiples by any alpha have the weight 0, its third power is finite
_MASKED_LOGIT = constexpr(-1e12)
_SUPPORT_GAP = constexpr(5e11)  # d is larger where only one of the models has a token
_TOLERANCE = constexpr(1e-6)
_BELOW = constexpr(-1.0)
_ABOVE = constexpr(2.0)
# after 4 passes every other one halves the bracket, 20 times enough
_SINGLE = constexpr(4)
_MAX_PASSES = constexpr(46)
_NEAREST_ONE = constexpr(1 - 2.0**-24)

# As in noise.py
_GOLDEN = constexpr(0x9E3779B97F4A7C15)
_MIX1 = constexpr(0xBF58476D1CE4E5B9)
_MIX2 = constexpr(0x94D049BB133111EB)
_SCRAMBLE = constexpr(0x85EBCA6B - 2**32)
_UNIT = constexpr(2.0**-31 * (1 - 2.0**-24))


# Noise


@triton.jit
def _splitmix(x):
    x = (x ^ (x >> 30)) * _MIX1
    x = (x ^ (x >> 27)) * _MIX2
    return x ^ (x >> 31)


@triton.jit
def _words(keys, position):
    """Addend and odd multiplier of one row."""
    key = tl.load(keys).to(tl.uint64)
    place = tl.load(position).to(tl.uint64)
    state = _splitmix(_splitmix(key) + place * _GOLDEN)
    upper = state >> 32
    return state.to(tl.int32), upper.to(tl.int32) | 1


@triton.jit
def _hash(t, a, b):
    """31 uniform bits from scrambled ids."""
    h = (t ^ a) * b
    h = (h ^ (h >> 16)) * _SCRAMBLE
    return h ^ (h >> 16)


@triton.jit
def _to_gumbel(h):
    v = h.to(tl.float32) * _UNIT + 0.5 * _UNIT
    # -log1p(-v) = -log(rest) v / (1 - rest): the quotient makes up for the rounding of `rest`
    rest = 1 - v
    lost = 1 - rest
    quotient = v / tl.where(lost == 0, 1.0, lost)
    log1p = -tl.log(rest) * quotient
    return -tl.log(tl.where(lost == 0, v, log1p))


@triton.jit
def _gumbel(noise, ids, inside, a, b, HASHED: constexpr):
    """Noise of one tile: read, or made from the table of scrambled ids that `noise` then is."""
    read = tl.load(noise + ids, mask=inside, other=0)
    if HASHED:
        return _to_gumbel(_hash(read, a, b))
    else:
        return read


@triton.jit
def _noise_of(noise, row, HASHED: constexpr):
    """Pointer to a row's noise or to the scrambled ids, and the row's two words."""
    if HASHED:
        a, b = _words(noise.keys + row, noise.position + row)
        return noise.table, a, b
    else:
        return noise.table + row * noise.stride, 0, 0


# Tiles


@triton.jit
def _row(batch, row):
    """The batch, with pointers to one of its rows."""
    student = batch.student + row * batch.student_stride
    teacher = batch.teacher + row * batch.teacher_stride
    if len(batch.support) == 0:
        return Batch(
            student, teacher, batch.student_stride, batch.teacher_stride,
            batch.vocab, batch.pieces, batch.scale, batch.support,
        )  # fmt: skip
    else:
        return Batch(
            student, teacher, batch.student_stride, batch.teacher_stride,
            batch.vocab, batch.pieces, batch.scale, (batch.support[0] + row * _COLUMNS,),
        )  # fmt: skip


@triton.jit
def _load(logits, ids, batch):
    """Logits of one tile, divided by the temperature; -inf beyond the row."""
    x = tl.load(logits + ids, mask=ids < batch.vocab, other=-_INF)
    return x.to(tl.float32) * batch.scale


@triton.jit
def _head(logits, batch, BLOCK: constexpr):
    """The largest logit of the first tile: an origin until that of the row is known."""
    x = _load(logits, tl.arange(0, BLOCK), batch)
    finite = (x > _MASKED_LOGIT) & (x < _INF)
    top = tl.max(tl.where(finite, x, _MASKED_LOGIT), 0)
    return tl.where(top > _MASKED_LOGIT, top, 0.0)


@triton.jit
def _at_least_masked(x):
    """NaN stays."""
    return tl.maximum(x, _MASKED_LOGIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pair(batch, ids, origins):
    """Both models of one tile relative to their origins, and d; -inf outside of the support."""
    s = _load(batch.student, ids, batch)
    t = _load(batch.teacher, ids, batch)
    if len(batch.support) > 0:
        outside = t < tl.load(batch.support[0] + _FLOOR).to(tl.float32)
        s = tl.where(outside, -_INF, s)
        t = tl.where(outside, -_INF, t)
    s = _at_least_masked(s - origins.at_student)
    t = _at_least_masked(t - origins.at_teacher)
    return s, t, t - s


@triton.jit
def _between(s, t, alpha):
    """The score (1 - alpha) s + alpha t."""
    return (1 - alpha) * s + alpha * t


@triton.jit
def _if_shared(d, x):
    """x where both models have the token."""
    return tl.where(tl.abs(d) < _SUPPORT_GAP, x, _NO_MAXIMUM)


@triton.jit
def _better(best, best_id, score, ids):
    """The larger score of every lane and its token id; the first of equals."""
    best_id = tl.where(score > best, ids, best_id)
    return tl.maximum(best, score), best_id


# Sums


@triton.jit
def _no_sums(BLOCK: constexpr):
    top = tl.full([], _NO_MAXIMUM, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    return Sums(top, zero, zero, zero, zero)


@triton.jit
def _weigh(x, top):
    """Weights relative to the largest so far, that largest, and the scale of older weights."""
    new = tl.maximum(top, tl.max(x, 0))
    weights = tl.exp(x - new)
    return weights, new, tl.exp(top - new)


@triton.jit
def _add(sums, x, d, POWER: constexpr):
    """The sums with one more tile, lane by lane; up to a power of d."""
    p, top, fade = _weigh(x, sums.top)
    w = sums.w * fade + p
    w_d = sums.w_d
    w_dd = sums.w_dd
    w_ddd = sums.w_ddd
    if POWER >= 1:
        p_d = p * d
        w_d = w_d * fade + p_d
    if POWER >= 2:
        p_dd = p_d * d
        w_dd = w_dd * fade + p_dd
    if POWER >= 3:
        w_ddd = w_ddd * fade + p_dd * d
    return Sums(top, w, w_d, w_dd, w_ddd)


@triton.jit
def _total(x):
    few = tl.sum(tl.reshape(x, [x.shape[0] // _LANES, _LANES]), 1)
    return tl.sum(few.to(tl.float64), 0)


@triton.jit
def _totals(sums):
    """The sums over all lanes."""
    w = _total(sums.w)
    w_d = _total(sums.w_d)
    w_dd = _total(sums.w_dd)
    w_ddd = _total(sums.w_ddd)
    return Sums(sums.top, w, w_d, w_dd, w_ddd)


@triton.jit
def _log_sum(sums):
    """log of the sum of exp(x)."""
    return tl.log(sums.w) + sums.top


# Columns


@triton.jit
def _put(out, column, value):
    tl.store(out + column, value)


@triton.jit
def _get(columns, column):
    return tl.load(columns + column)


@triton.jit
def _put_sums(out, first, sums, POWER: constexpr):
    sums = _totals(sums)
    _put(out, first, sums.top)
    _put(out, first + 1, sums.w)
    if POWER >= 1:
        _put(out, first + 2, sums.w_d)
    if POWER >= 2:
        _put(out, first + 3, sums.w_dd)
    if POWER >= 3:
        _put(out, first + 4, sums.w_ddd)


@triton.jit
def _is_good(sums):
    """Whether a row is a distribution; with NaN and +inf, the sum is NaN."""
    return (sums.top > -_SUPPORT_GAP) & (sums.w > 0)


@triton.jit
def _put_best(out, best, best_id):
    highest = tl.max(best, 0)
    winners = tl.where(best == highest, best_id, 2**31 - 1)
    _put(out, _HIGHEST, highest)
    _put(out, _BEST_ID, tl.min(winners, 0))


@triton.jit
def _pieces(columns, row, count, WIDTH: constexpr):
    """All pieces of a row."""
    every = tl.arange(0, WIDTH)
    first = columns + (row * count + every) * _COLUMNS
    return Pieces(first, every < count)


@triton.jit
def _column(pieces, column, other):
    """One number of every piece."""
    return tl.load(pieces.first + column, mask=pieces.inside, other=other)


@triton.jit
def _scales(pieces, first):
    """The largest term of the row, and what each piece's sums are to be scaled by."""
    tops = _column(pieces, first, _NO_MAXIMUM)
    top = tl.max(tops, 0)
    return top, tl.exp(tops - top)


@triton.jit
def _sum(pieces, column, scale):
    return tl.sum(_column(pieces, column, 0.0) * scale, 0)


@triton.jit
def _row_sums(pieces, first, POWER: constexpr):
    """Sums of the whole row."""
    top, scale = _scales(pieces, first)
    w = _sum(pieces, first + 1, scale)
    w_d = w
    w_dd = w
    w_ddd = w
    if POWER >= 1:
        w_d = _sum(pieces, first + 2, scale)
    if POWER >= 2:
        w_dd = _sum(pieces, first + 3, scale)
    if POWER >= 3:
        w_ddd = _sum(pieces, first + 4, scale)
    return Sums(top, w, w_d, w_dd, w_ddd)


@triton.jit
def _best(pieces):
    """The id of the highest score of a row, the first of equals."""
    highest = _column(pieces, _HIGHEST, -_INF)
    ids = _column(pieces, _BEST_ID, 0.0)
    winners = (highest == tl.max(highest, 0)) & pieces.inside
    first = tl.min(tl.where(winners, ids, 2.0**31 - 1), 0)
    return first.to(tl.int64)


# The support


@triton.jit
def survey(batch, surveyed, PIECE: constexpr, BLOCK: constexpr, STAGES: constexpr):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    batch = _row(batch, row)
    head_s = _head(batch.student, batch, BLOCK)
    head_t = _head(batch.teacher, batch, BLOCK)
    student = _no_sums(BLOCK)
    teacher = _no_sums(BLOCK)
    top = tl.full([BLOCK], -_INF, tl.float32)
    first = piece * PIECE
    for start in tl.range(first, tl.minimum(first + PIECE, batch.vocab), BLOCK, num_stages=STAGES):
        ids = start + tl.arange(0, BLOCK)
        s, t, d = _pair(batch, ids, Origins(head_s, head_t))
        student = _add(student, s, d, 0)
        teacher = _add(teacher, t, d, 0)
        top = tl.maximum(top, _load(batch.teacher, ids, batch))
    out = surveyed + (row * batch.pieces + piece) * _COLUMNS
    _put_sums(out, _STUDENT, student, 0)
    _put_sums(out, _TEACHER, teacher, 0)
    _put(out, _HEAD_STUDENT, head_s)
    _put(out, _HEAD_TEACHER, head_t)
    _put(out, _TOP_TEACHER, tl.max(top, 0))


@triton.jit
def restrict(surveyed, count, support, log_min_p, WIDTH: constexpr):
    row = tl.program_id(0).to(tl.int64)
    pieces = _pieces(surveyed, row, count, WIDTH)
    student = _row_sums(pieces, _STUDENT, 0)
    teacher = _row_sums(pieces, _TEACHER, 0)
    head_s = tl.max(_column(pieces, _HEAD_STUDENT, -_INF), 0)
    head_t = tl.max(_column(pieces, _HEAD_TEACHER, -_INF), 0)
    top = tl.max(_column(pieces, _TOP_TEACHER, -_INF), 0).to(tl.float32)
    out = support + row * _COLUMNS
    _put(out, _FLOOR, top + log_min_p)
    _put(out, _WHOLE_STUDENT, head_s + _log_sum(student))
    _put(out, _WHOLE_TEACHER, head_t + _log_sum(teacher))
    _put(out, _SPOILT_STUDENT, _is_good(student) == 0)
    _put(out, _SPOILT_TEACHER, _is_good(teacher) == 0)


# First pass


@triton.jit
def measure(
    batch, measured, settings,
    METHOD: constexpr, PIECE: constexpr, BLOCK: constexpr, STAGES: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    batch = _row(batch, row)
    head_s = _head(batch.student, batch, BLOCK)
    head_t = _head(batch.teacher, batch, BLOCK)
    origins = Origins(head_s, head_t)
    student = _no_sums(BLOCK)
    teacher = _no_sums(BLOCK)
    mixture = _no_sums(BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    least = most
    shared = most + _NO_MAXIMUM
    power: constexpr = METHOD == "reverse_kl_symmetry"
    first = piece * PIECE
    for start in tl.range(first, tl.minimum(first + PIECE, batch.vocab), BLOCK, num_stages=STAGES):
        s, t, d = _pair(batch, start + tl.arange(0, BLOCK), origins)
        shared = tl.maximum(shared, tl.minimum(s, t))
        most = tl.maximum(most, d)
        least = tl.minimum(least, d)
        student = _add(student, s, d, power)
        teacher = _add(teacher, t, d, power)
        if METHOD == "kl_symmetry":
            mixture = _add(mixture, _between(s, t, settings.first), d, 3)
    out = measured + (row * batch.pieces + piece) * _COLUMNS
    _put_sums(out, _STUDENT, student, 1)
    _put_sums(out, _TEACHER, teacher, 1)
    _put_sums(out, _MIXTURE, mixture, 3)
    _put(out, _HEAD_STUDENT, head_s)
    _put(out, _HEAD_TEACHER, head_t)
    _put(out, _SHARED, tl.max(shared, 0))
    _put(out, _MOST_D, tl.max(most, 0))
    _put(out, _LEAST_D, tl.min(least, 0))


# Further alphas


@triton.jit
def _derivatives(sums, gap):
    """F', F'' and F''' from sums."""
    mean = sums.w_d / sums.w
    square = mean * mean
    variance = sums.w_dd / sums.w - square
    third = sums.w_ddd / sums.w
    return mean - gap, variance, third - mean * (3 * variance + square)


@triton.jit
def _sums_at(batch, alpha, origins, first, last, BLOCK: constexpr, STAGES: constexpr):
    """Sums of these tokens at one alpha."""
    weight = alpha.to(tl.float32)
    sums = _no_sums(BLOCK)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        s, t, d = _pair(batch, start + tl.arange(0, BLOCK), origins)
        sums = _add(sums, _between(s, t, weight), d, 3)
    return sums


@triton.jit
def _is_root(slope, curvature):
    limit = tl.maximum(curvature, 1.0) * _TOLERANCE
    return tl.abs(slope) <= limit


@triton.jit
def _start(pieces, known, settings):
    """The search after the first alpha, which is that of `measure`."""
    alpha = tl.cast(settings.first, tl.float64)
    low = tl.cast(settings.low, tl.float64)
    high = tl.cast(settings.high, tl.float64)
    slope, curvature, third = _derivatives(_row_sums(pieces, _MIXTURE, 3), known.head_gap)
    left = tl.where(slope >= 0, low, alpha)
    right = tl.where(slope >= 0, alpha, high)
    done = known.rootless | _is_root(slope, curvature) | (right - left <= _TOLERANCE)
    return Search(
        known.at_student, known.at_teacher, known.gap,
        alpha, slope, curvature, third, left, right, done,
    )  # fmt: skip


@triton.jit
def _at_next(search, settings, passes):
    """The search with the alpha to evaluate next, unless it is done. `passes`: evaluations so far.

    `_Bracket.next`, in float32; the middle in every other pass where parabolas do not help.
    """
    squared = search.curvature * search.curvature - 2 * search.slope * search.third
    root = tl.sqrt(tl.maximum(squared, 0.0))
    guess = search.alpha - 2 * search.slope / (search.curvature + root)
    inside = (guess > search.left) & (guess < search.right)
    useful = inside & ((passes < _SINGLE) | (passes % 2 == 0))
    guess = tl.where(useful, guess, (search.left + search.right) / 2)
    guess = tl.maximum(guess, search.left + _TOLERANCE / 2)
    guess = tl.minimum(guess, search.right - _TOLERANCE / 2)
    guess = guess.to(tl.float32).to(tl.float64)
    second = (passes == 1) & (settings.second >= 0)
    guess = tl.where(second, settings.second, guess)
    return Search(
        search.at_student, search.at_teacher, search.gap,
        tl.where(search.done, search.alpha, guess),
        search.slope, search.curvature, search.third, search.left, search.right, search.done,
    )  # fmt: skip


@triton.jit
def _after(search, sums):
    """The search when its alpha has been evaluated; as it is where it was done before."""
    slope, curvature, third = _derivatives(sums, search.gap)
    left = tl.where(slope >= 0, search.left, search.alpha)
    right = tl.where(slope >= 0, search.alpha, search.right)
    found = _is_root(slope, curvature) | (right - left <= _TOLERANCE)
    done = search.done
    return Search(
        search.at_student, search.at_teacher, search.gap, search.alpha,
        tl.where(done, search.slope, slope),
        tl.where(done, search.curvature, curvature),
        tl.where(done, search.third, third),
        tl.where(done, search.left, left),
        tl.where(done, search.right, right),
        done | found,
    )  # fmt: skip


@triton.jit
def _put_search(out, search):
    for i in tl.static_range(_SEARCH):
        _put(out, i, search[i])


@triton.jit
def _get_search(columns):
    return Search(
        _get(columns, 0).to(tl.float32),
        _get(columns, 1).to(tl.float32),
        _get(columns, 2),
        _get(columns, 3),
        _get(columns, 4),
        _get(columns, 5),
        _get(columns, 6),
        _get(columns, 7),
        _get(columns, 8),
        _get(columns, 9) != 0,
    )


@triton.jit
def _search_after(work, settings, row, batch, PASSES: constexpr, WIDTH: constexpr):
    """The search after `measure` and so many passes of `refine`."""
    count = batch.pieces
    if PASSES == 0:
        pieces = _pieces(work.measured, row, count, WIDTH)
        return _start(pieces, _known(pieces, batch), settings)
    else:
        place = (PASSES - 1) * tl.num_programs(0).to(tl.int64) + row
        search = _get_search(work.searched + place * _COLUMNS)
        pieces = _pieces(work.refined, place, count, WIDTH)
        written = pieces.inside & (search.done == 0)
        sums = _row_sums(Pieces(pieces.first, written), _REFINED, 3)
        return _after(search, sums)


@triton.jit
def refine(
    batch, work, settings,
    PASS: constexpr, WIDTH: constexpr, PIECE: constexpr, BLOCK: constexpr, STAGES: constexpr,
):  # fmt: skip
    """Pass 1, 2, ...: every piece makes the same alpha of what the pass before left."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    batch = _row(batch, row)
    search = _search_after(work, settings, row, batch, PASS - 1, WIDTH)
    search = _at_next(search, settings, PASS)
    place = (PASS - 1) * tl.num_programs(0).to(tl.int64) + row
    if piece == 0:
        _put_search(work.searched + place * _COLUMNS, search)
    if search.done == 0:
        first = piece * PIECE
        last = tl.minimum(first + PIECE, batch.vocab)
        sums = _sums_at(batch, search.alpha, search, first, last, BLOCK, STAGES)
        out = work.refined + (place * batch.pieces + piece) * _COLUMNS
        _put_sums(out, _REFINED, sums, 3)


@triton.jit
def _root(
    batch, search, settings, PASSES: constexpr, BLOCK: constexpr, STAGES: constexpr
):  # fmt: skip
    """`solve_kl_symmetry`, continued; not where there is no root."""
    passes = PASSES + 1
    while (passes < _MAX_PASSES) & (search.done == 0):
        search = _at_next(search, settings, passes)
        sums = _sums_at(batch, search.alpha, search, 0, batch.vocab, BLOCK, STAGES)
        search = _after(search, _totals(sums))
        passes += 1
    low = tl.cast(settings.low, tl.float64)
    high = tl.cast(settings.high, tl.float64)
    outside = ~_is_root(search.slope, search.curvature)
    below = outside & (search.alpha <= low) & (search.slope > 0)
    alpha = tl.where(below, _BELOW, search.alpha)
    above = outside & (alpha >= high) & (search.slope < 0)
    return tl.where(above, _ABOVE, alpha)


# One program per row


@triton.jit
def _leads(batch, alpha, known, BLOCK: constexpr):
    """Whether F(2 alpha) > F(2 alpha - 1)."""
    ahead = (2 * alpha).to(tl.float32)
    behind = (2 * alpha - 1).to(tl.float32)
    sums_ahead = _no_sums(BLOCK)
    sums_behind = _no_sums(BLOCK)
    for start in range(0, batch.vocab, BLOCK):
        s, t, d = _pair(batch, start + tl.arange(0, BLOCK), known)
        x = _if_shared(d, _between(s, t, ahead))
        sums_ahead = _add(sums_ahead, x, d, 0)
        x = _if_shared(d, _between(s, t, behind))
        sums_behind = _add(sums_behind, x, d, 0)
    log_sum = _log_sum(_totals(sums_ahead))
    return log_sum - known.gap > _log_sum(_totals(sums_behind))


@triton.jit
def _ess_balance(batch, known, BLOCK: constexpr):
    """`ess_balance`: 1/2 on a common support and in bad rows, else bisected."""
    low = tl.full([], 0.0, tl.float64)
    high = tl.full([], 1.0, tl.float64)
    level = ((known.only_student | known.only_teacher) == 0) | known.rootless
    steps = tl.where(level, 24, 0)
    while steps < 24:
        alpha = (low + high) / 2
        leads = _leads(batch, alpha, known, BLOCK)
        low = tl.where(leads, low, alpha)
        high = tl.where(leads, alpha, high)
        steps += 1
    root = tl.maximum((low + high) / 2, 1 - _NEAREST_ONE)
    return tl.where(level, 0.5, tl.minimum(root, _NEAREST_ONE))


@triton.jit
def _reverse_kl_symmetry(pieces, known):
    """`reverse_kl_symmetry`, from the slopes of F at 1 and at 0."""
    student = _row_sums(pieces, _STUDENT, 1)
    teacher = _row_sums(pieces, _TEACHER, 1)
    to_student = teacher.w_d / teacher.w - known.head_gap
    to_teacher = known.head_gap - student.w_d / student.w
    to_student = tl.where(known.only_teacher, _INF, tl.maximum(to_student, 0.0))
    to_teacher = tl.where(known.only_student, _INF, tl.maximum(to_teacher, 0.0))
    alpha = 1 / (1 + to_teacher / to_student)
    return tl.where(alpha != alpha, 0.5, alpha)


@triton.jit
def _known(pieces, batch):
    """What follows from the sums of all pieces."""
    student = _row_sums(pieces, _STUDENT, 0)
    teacher = _row_sums(pieces, _TEACHER, 0)
    top_s = tl.max(_column(pieces, _HEAD_STUDENT, -_INF), 0) + student.top
    top_t = tl.max(_column(pieces, _HEAD_TEACHER, -_INF), 0) + teacher.top
    at_s = top_s.to(tl.float32)
    at_t = top_t.to(tl.float32)
    log_z_s = top_s - at_s + tl.log(student.w)
    log_z_t = top_t - at_t + tl.log(teacher.w)
    if len(batch.support) == 0:
        good_s = _is_good(student)
        good_t = _is_good(teacher)
    else:
        good_s = _get(batch.support[0], _SPOILT_STUDENT) == 0
        good_t = _get(batch.support[0], _SPOILT_TEACHER) == 0
    shared = tl.max(_column(pieces, _SHARED, _NO_MAXIMUM), 0) > -_SUPPORT_GAP
    return Known(
        at_student=at_s,
        at_teacher=at_t,
        log_z_student=log_z_s,
        log_z_teacher=log_z_t,
        bad_student=good_s == 0,
        bad_teacher=good_t == 0,
        disjoint=shared == 0,
        only_student=tl.min(_column(pieces, _LEAST_D, 0.0), 0) < -_SUPPORT_GAP,
        only_teacher=tl.max(_column(pieces, _MOST_D, 0.0), 0) > _SUPPORT_GAP,
        rootless=(good_s & good_t & shared) == 0,
        gap=log_z_t - log_z_s,
        head_gap=_log_sum(teacher) - _log_sum(student),
    )


@triton.jit
def _free_alpha(batch, place, pieces, known, settings, METHOD: constexpr, BLOCK: constexpr):
    """alpha before the bounds, of the methods that do not search for a root of F'."""
    if METHOD == "reverse_kl_symmetry":
        return _reverse_kl_symmetry(pieces, known)
    elif METHOD == "ess_balance":
        return _ess_balance(batch, known, BLOCK)
    else:
        share = tl.minimum(place.to(tl.float64) / settings.tokens, 1.0)
        return settings.start + (settings.end - settings.start) * share


@triton.jit
def _put_masses(out, batch, known):
    if len(batch.support) == 0:
        _put(out, _MASS_STUDENT, 0.0)
        _put(out, _MASS_TEACHER, 0.0)
    else:
        student = known.at_student + known.log_z_student - _get(batch.support[0], _WHOLE_STUDENT)
        teacher = known.at_teacher + known.log_z_teacher - _get(batch.support[0], _WHOLE_TEACHER)
        _put(out, _MASS_STUDENT, tl.where(known.disjoint, -_INF, tl.minimum(student, 0.0)))
        _put(out, _MASS_TEACHER, tl.minimum(teacher, 0.0))


@triton.jit
def solve(
    batch, position, work, solved, settings,
    METHOD: constexpr, PASSES: constexpr, WIDTH: constexpr, BLOCK: constexpr, STAGES: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = _row(batch, row)
    pieces = _pieces(work.measured, row, batch.pieces, WIDTH)
    known = _known(pieces, batch)
    place = tl.load(position + row)
    if METHOD == "kl_symmetry":
        search = _search_after(work, settings, row, batch, PASSES, WIDTH)
        free = _root(batch, search, settings, PASSES, BLOCK, STAGES)
        free = tl.where(settings.mirror > 0, 1 - free, free)
    else:
        free = _free_alpha(batch, place, pieces, known, settings, METHOD, BLOCK)
    if METHOD != "schedule":
        free = tl.where(known.disjoint, 1.0, free)
    alpha = tl.maximum(free, settings.alpha_min)
    alpha = tl.minimum(alpha, settings.alpha_max)
    clamped = tl.abs(alpha - free) > 1e-7
    forced = (place == 0) & (settings.force_first > 0)
    if len(batch.support) == 0:
        forced = forced | (known.disjoint & (alpha > 0))
    else:  # the student has nothing of the support
        forced = forced | known.disjoint
    alpha = tl.where(forced, 1.0, alpha).to(tl.float32)
    out = solved + row * _COLUMNS
    _put(out, _ALPHA, alpha)
    _put(out, _CLAMPED, clamped & (forced == 0))
    _put(out, _AT_STUDENT, known.at_student)
    _put(out, _AT_TEACHER, known.at_teacher)
    _put(out, _LOG_Z_STUDENT, known.log_z_student)
    _put(out, _LOG_Z_TEACHER, known.log_z_teacher)
    _put(out, _BAD_STUDENT, known.bad_student)
    _put(out, _BAD_TEACHER, known.bad_teacher)
    _put(out, _NO_STUDENT, (alpha == 1) & known.only_teacher)
    _put(out, _NO_TEACHER, (alpha == 0) & known.only_student)
    _put(out, _FALLBACK, known.disjoint & (alpha > 0))
    _put_masses(out, batch, known)


# The draw


@triton.jit
def mix(
    batch, noise, solved, mixed,
    HASHED: constexpr, GREEDY: constexpr, PIECE: constexpr, BLOCK: constexpr, STAGES: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    batch = _row(batch, row)
    noise, a, b = _noise_of(noise, row, HASHED)
    known = solved + row * _COLUMNS
    alpha = _get(known, _ALPHA).to(tl.float32)
    at_s = _get(known, _AT_STUDENT).to(tl.float32)
    at_t = _get(known, _AT_TEACHER).to(tl.float32)
    origins = Origins(at_s, at_t)
    q = _no_sums(BLOCK)
    squares_s = _no_sums(BLOCK)
    squares_t = _no_sums(BLOCK)
    q_x = tl.zeros([BLOCK], tl.float32)
    best = q_x + _NO_MAXIMUM
    best_id = tl.zeros([BLOCK], tl.int32)
    first = piece * PIECE
    for start in tl.range(first, tl.minimum(first + PIECE, batch.vocab), BLOCK, num_stages=STAGES):
        ids = start + tl.arange(0, BLOCK)
        s, t, d = _pair(batch, ids, origins)
        x = _between(s, t, alpha)
        p, top, fade = _weigh(x, q.top)
        q_x += q.w * (q.top - top)
        q_x = q_x * fade + p * (x - top)
        q = _add(q, x, d, 2)
        # q^2 / p_student = exp(2 x - s)
        squares_s = _add(squares_s, _if_shared(d, x + alpha * d), d, 0)
        squares_t = _add(squares_t, _if_shared(d, x - (1 - alpha) * d), d, 0)
        score = x
        if not GREEDY:
            score += _gumbel(noise, ids, ids < batch.vocab, a, b, HASHED)
        best, best_id = _better(best, best_id, score, ids)
    out = mixed + (row * batch.pieces + piece) * _COLUMNS
    _put_sums(out, _Q, q, 2)
    _put_sums(out, _SQUARES_STUDENT, squares_s, 0)
    _put_sums(out, _SQUARES_TEACHER, squares_t, 0)
    _put(out, _Q_X, _total(q_x))
    _put_best(out, best, best_id)


# The token


@triton.jit
def _ess(pieces, first, log_sum, log_z):
    """1 / sum q^2 / p, at most 1."""
    log_squares = _log_sum(_row_sums(pieces, first, 0))
    squares = tl.exp(log_squares - 2 * log_sum + log_z)
    return 1 / tl.maximum(squares, 1.0)


@triton.jit
def _put_field(trace, column, value):
    tl.store(trace.fields + column, value + trace.nan)


@triton.jit
def _trace_mixture(trace, pieces, known):
    """Write what does not depend on the token. Gives F."""
    alpha = _get(known, _ALPHA)
    log_z_s = _get(known, _LOG_Z_STUDENT)
    log_z_t = _get(known, _LOG_Z_TEACHER)
    no_student = _get(known, _NO_STUDENT) != 0
    no_teacher = _get(known, _NO_TEACHER) != 0
    q = _row_sums(pieces, _Q, 2)
    _, scale = _scales(pieces, _Q)
    # E[x] relative to the row's largest: each piece's is relative to its own
    lower = _column(pieces, _Q, _NO_MAXIMUM) - q.top
    lowered = tl.where(scale > 0, scale * lower, 0.0)
    q_x = _sum(pieces, _Q_X, scale)
    q_x += _sum(pieces, _Q + 1, lowered)
    log_sum = _log_sum(q)
    gap = log_z_t - log_z_s
    mean_d = q.w_d / q.w
    slope = mean_d - gap
    variance = tl.maximum(q.w_dd / q.w - mean_d * mean_d, 0.0)
    curvature = tl.where(no_student | no_teacher, _INF, variance)
    F = log_sum - log_z_s - alpha * gap
    mass_s = _get(known, _MASS_STUDENT)
    mass_t = _get(known, _MASS_TEACHER)
    kl_s = tl.where(no_student, _INF, tl.maximum(alpha * slope - F, 0.0))
    kl_t = tl.where(no_teacher, _INF, tl.maximum((alpha - 1) * slope - F, 0.0))
    ess_s = _ess(pieces, _SQUARES_STUDENT, log_sum, log_z_s)
    ess_t = _ess(pieces, _SQUARES_TEACHER, log_sum, log_z_t)
    entropy = tl.log(q.w) - q_x / q.w
    _put_field(trace, _TRACE_ALPHA, alpha)
    _put_field(trace, _TRACE_CLAMPED, _get(known, _CLAMPED))
    _put_field(trace, _TRACE_KL_STUDENT, kl_s - mass_s)
    _put_field(trace, _TRACE_KL_TEACHER, kl_t - mass_t)
    _put_field(trace, _TRACE_ESS_STUDENT, tl.where(no_student, 0.0, ess_s * tl.exp(mass_s)))
    _put_field(trace, _TRACE_ESS_TEACHER, tl.where(no_teacher, 0.0, ess_t * tl.exp(mass_t)))
    _put_field(trace, _TRACE_ENTROPY, tl.maximum(entropy, 0.0))
    _put_field(trace, _TRACE_FALLBACK, _get(known, _FALLBACK))
    _put_field(trace, _TRACE_CURVATURE, curvature)
    _put_field(trace, _TRACE_VETOED, 1 - tl.exp(mass_s))
    _put_field(trace, _TRACE_KL_STUDENT_RESTRICTED, kl_s)
    _put_field(trace, _TRACE_KL_TEACHER_RESTRICTED, kl_t)
    return F


@triton.jit
def _logit(logits, token, scale):
    """Of one token, divided by the temperature."""
    x = tl.load(logits + token).to(tl.float32) * scale
    return x.to(tl.float64)


@triton.jit
def _trace_token(trace, batch, token, known, F, GREEDY: constexpr):
    """Write the log-probabilities of the drawn token."""
    alpha = _get(known, _ALPHA)
    at_s = _get(known, _AT_STUDENT)
    at_t = _get(known, _AT_TEACHER)
    logit_s = _logit(batch.student, token, batch.scale)
    logit_t = _logit(batch.teacher, token, batch.scale)
    log_p_s = logit_s - at_s - _get(known, _LOG_Z_STUDENT)
    log_p_t = logit_t - at_t - _get(known, _LOG_Z_TEACHER)
    # 0 times -inf is no part of a mixture
    log_q = tl.where(alpha < 1, (1 - alpha) * log_p_s, 0.0)
    log_q += tl.where(alpha > 0, alpha * log_p_t, 0.0)
    log_q -= F
    if GREEDY:
        log_q = log_q * 0
    _put_field(trace, _TRACE_LOG_P_STUDENT, log_p_s + _get(known, _MASS_STUDENT))
    _put_field(trace, _TRACE_LOG_P_TEACHER, log_p_t + _get(known, _MASS_TEACHER))
    _put_field(trace, _TRACE_LOG_P_STUDENT_RESTRICTED, log_p_s)
    _put_field(trace, _TRACE_LOG_Q, log_q)


@triton.jit
def finish(batch, solved, mixed, outputs, GREEDY: constexpr, WIDTH: constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch = _row(batch, row)
    pieces = _pieces(mixed, row, batch.pieces, WIDTH)
    known = solved + row * _COLUMNS
    bad_s = _get(known, _BAD_STUDENT) != 0
    bad_t = _get(known, _BAD_TEACHER) != 0
    bad = bad_s | bad_t
    token = tl.where(bad, 0, _best(pieces))
    nan = tl.where(bad, float("nan"), 0.0)
    trace = Trace(outputs.trace + row * _TRACE_WIDTH, nan)
    F = _trace_mixture(trace, pieces, known)
    _trace_token(trace, batch, token, known, F, GREEDY)
    tl.store(outputs.token + row, token)
    tl.store(outputs.bad_student + row, bad_s)
    tl.store(outputs.bad_teacher + row, bad_t)


# Drafts


@triton.jit
def draft(
    batch, noise, drafted,
    HASHED: constexpr, GREEDY: constexpr, PIECE: constexpr, BLOCK: constexpr, STAGES: constexpr,
):  # fmt: skip
    """One piece of a row: the student's largest logit + noise; without the noise if greedy."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    batch = _row(batch, row)
    noise, a, b = _noise_of(noise, row, HASHED)
    best = tl.full([BLOCK], _NO_MAXIMUM, tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    first = piece * PIECE
    for start in tl.range(first, tl.minimum(first + PIECE, batch.vocab), BLOCK, num_stages=STAGES):
        ids = start + tl.arange(0, BLOCK)
        score = _load(batch.student, ids, batch)
        if not GREEDY:
            score += _gumbel(noise, ids, ids < batch.vocab, a, b, HASHED)
        best, best_id = _better(best, best_id, score, ids)
    out = drafted + (row * batch.pieces + piece) * _COLUMNS
    _put_best(out, best, best_id)


@triton.jit
def choose(drafted, pieces, tokens, WIDTH: constexpr):
    """The draft of a row."""
    row = tl.program_id(0).to(tl.int64)
    token = _best(_pieces(drafted, row, pieces, WIDTH))
    tl.store(tokens + row, token)
