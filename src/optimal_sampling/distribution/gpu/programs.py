"""The GPU programs behind `launch`, in Triton. Imported only where Triton is installed and used.

Four launches make a step; in the first and the third, every program takes one piece of one row:

    measure   [rows, pieces]  log Z of both models, their common support, F' at the first alpha
    solve     [rows]          alpha; by further passes over the row where `measure` is not enough
    mix       [rows, pieces]  the sums of q at alpha, and the largest log q + noise
    finish    [rows]          the token and its diagnostics

So a row is read twice, and once more for every alpha that its solver evaluates beyond the first.
Sums are taken in float32, lane by lane and relative to the largest term so far, and added up in
float64. The pieces depend on the vocabulary alone: a row's result has the same bits whatever rows
are beside it.

Names and mathematics are those of `pair`, `solver`, `methods` and `mixture`.
"""

# mypy: ignore-errors
# ruff: noqa: D103, RET505
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from optimal_sampling.distribution.gpu.launch import TRACED
from optimal_sampling.types import TRACE_FIELDS

__all__ = [
    "DRAFTED",
    "MEASURED",
    "MIXED",
    "SOLVED",
    "Batch",
    "Noise",
    "Outputs",
    "Settings",
    "choose",
    "draft",
    "finish",
    "measure",
    "mix",
    "solve",
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


class Outputs(NamedTuple):
    """What `finish` writes."""

    token: object
    trace: object
    bad_student: object
    bad_teacher: object


class Known(NamedTuple):
    """What `solve` takes from the sums of `measure`."""

    at_student: object
    """The largest logits, which both models are relative to here and in `mix`."""
    at_teacher: object
    log_z_student: object
    log_z_teacher: object
    bad_student: object
    bad_teacher: object
    shared: object
    """Whether there is a token that both models have, or that only one of them has."""
    only_student: object
    only_teacher: object
    head_gap: object
    """log Z of the teacher less the student's, in the sums of `measure`."""


class Origins(NamedTuple):
    """Numbers near the largest logit of each model, which its logits are taken relative to."""

    student: object
    teacher: object


# Columns of what the launches leave for one another; the last name is their number

# of `measure`, per piece
(
    _TOP_STUDENT,
    _TOP_TEACHER,
    _TOP_X,
    _HEAD_STUDENT,
    _HEAD_TEACHER,
    _SHARED,
    _Z_STUDENT,
    _Z_TEACHER,
    _STUDENT_D,
    _TEACHER_D,
    _W,
    _W_D,
    _W_DD,
    _W_DDD,
    _MOST_D,
    _LEAST_D,
    MEASURED,
) = map(tl.constexpr, range(17))

# of `solve`, per row
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
    SOLVED,
) = map(tl.constexpr, range(12))

# of `mix`, per piece
(
    _MIX_TOP,
    _MIX_TOP_STUDENT,
    _MIX_TOP_TEACHER,
    _MIX_W,
    _MIX_W_X,
    _MIX_W_D,
    _MIX_W_DD,
    _MIX_SQUARES_STUDENT,
    _MIX_SQUARES_TEACHER,
    _MIX_HIGHEST,
    _MIX_BEST_ID,
    MIXED,
) = map(tl.constexpr, range(12))

# of `draft`, per piece
_DRAFT_HIGHEST, _DRAFT_BEST_ID, DRAFTED = map(tl.constexpr, range(3))

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
) = (tl.constexpr(TRACE_FIELDS.index(name)) for name in TRACED)
_TRACE_WIDTH = tl.constexpr(len(TRACE_FIELDS))

_INF = tl.constexpr(float("inf"))
_NO_MAXIMUM = tl.constexpr(-1e18)  # below every score
# stands for -inf: its multiples by any alpha have the weight 0, its third power is finite
_MASKED_LOGIT = tl.constexpr(-1e12)
_SUPPORT_GAP = tl.constexpr(5e11)  # d is larger where only one of the models has a token
_TOLERANCE = tl.constexpr(1e-6)
_BELOW = tl.constexpr(-1.0)
_ABOVE = tl.constexpr(2.0)
# after 4 passes every other one halves the bracket, 20 times enough
_SINGLE = tl.constexpr(4)
_MAX_PASSES = tl.constexpr(46)
_NEAREST_ONE = tl.constexpr(1 - 2.0**-24)

# As in noise.py, in two's complement
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX2 = tl.constexpr(0x94D049BB133111EB - 2**64)
_LOW30 = tl.constexpr(2**34 - 1)
_LOW31 = tl.constexpr(2**37 - 1)
_LOW33 = tl.constexpr(2**33 - 1)
_SCRAMBLE = tl.constexpr(0x85EBCA6B - 2**32)
_UNIT = tl.constexpr(2.0**-31 * (1 - 2.0**-24))


# Noise


@triton.jit
def _splitmix(x):
    x = (x ^ ((x >> 30) & _LOW30)) * _MIX1
    x = (x ^ ((x >> 27) & _LOW31)) * _MIX2
    return x ^ ((x >> 31) & _LOW33)


@triton.jit
def _words(keys, position):
    """Addend and odd multiplier of one row."""
    state = _splitmix(_splitmix(tl.load(keys)) + tl.load(position).to(tl.int64) * _GOLDEN)
    return state.to(tl.int32), (state >> 32).to(tl.int32) | 1


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
    log1p = -tl.log(rest) * (v / tl.where(lost == 0, 1.0, lost))
    return -tl.log(tl.where(lost == 0, v, log1p))


@triton.jit
def _gumbel(noise, ids, inside, a, b, HASHED: tl.constexpr):
    """Noise of one tile: read, or made from the table of scrambled ids that `noise` then is."""
    read = tl.load(noise + ids, mask=inside, other=0)
    if HASHED:
        return _to_gumbel(_hash(read, a, b))
    else:
        return read


@triton.jit
def _noise_of(noise, row, HASHED: tl.constexpr):
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
    return Batch(
        batch.student + row * batch.student_stride,
        batch.teacher + row * batch.teacher_stride,
        batch.student_stride,
        batch.teacher_stride,
        batch.vocab,
        batch.pieces,
        batch.scale,
    )


@triton.jit
def _load(logits, ids, batch):
    """Logits of one tile, divided by the temperature; -inf beyond the row."""
    x = tl.load(logits + ids, mask=ids < batch.vocab, other=-_INF)
    return x.to(tl.float32) * batch.scale


@triton.jit
def _head(logits, batch, BLOCK: tl.constexpr):
    """The largest logit of the first tile: an origin until that of the row is known."""
    x = _load(logits, tl.arange(0, BLOCK), batch)
    top = tl.max(tl.where((x > _MASKED_LOGIT) & (x < _INF), x, _MASKED_LOGIT), 0)
    return tl.where(top > _MASKED_LOGIT, top, 0.0)


@triton.jit
def _at_least_masked(x):
    """NaN stays."""
    return tl.maximum(x, _MASKED_LOGIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pair(batch, ids, origins):
    """Both models of one tile relative to their origins, and d."""
    s = _at_least_masked(_load(batch.student, ids, batch) - origins.student)
    t = _at_least_masked(_load(batch.teacher, ids, batch) - origins.teacher)
    return s, t, t - s


@triton.jit
def _weigh(x, top):
    """Weights relative to the largest so far, that largest, and the scale of older weights."""
    new = tl.maximum(top, tl.max(x, 0))
    return tl.exp(x - new), new, tl.exp(top - new)


@triton.jit
def _if_shared(d, x):
    """x where both models have the token."""
    return tl.where(tl.abs(d) < _SUPPORT_GAP, x, _NO_MAXIMUM)


@triton.jit
def _total(x):
    return tl.sum(x.to(tl.float64), 0)


# Sums of pieces


@triton.jit
def _column(sums, column, pieces, other, WIDTH: tl.constexpr):
    """One number of every piece of a row."""
    every = tl.arange(0, WIDTH)
    return tl.load(sums + column * pieces + every, mask=every < pieces, other=other)


@triton.jit
def _tops(sums, column, pieces, WIDTH: tl.constexpr):
    """The largest term of the row, and what each piece's sums are to be scaled by."""
    tops = _column(sums, column, pieces, _NO_MAXIMUM, WIDTH)
    top = tl.max(tops, 0)
    return top, tl.exp(tops - top)


@triton.jit
def _sum(sums, column, pieces, scale, WIDTH: tl.constexpr):
    return tl.sum(_column(sums, column, pieces, 0.0, WIDTH) * scale, 0)


@triton.jit
def _best(sums, highest_column, id_column, pieces, WIDTH: tl.constexpr):
    """The id of the highest score of a row, the first of equals."""
    every = tl.arange(0, WIDTH)
    highest = _column(sums, highest_column, pieces, -_INF, WIDTH)
    ids = _column(sums, id_column, pieces, 0.0, WIDTH)
    winners = (highest == tl.max(highest, 0)) & (every < pieces)
    return tl.min(tl.where(winners, ids, 2.0**31 - 1), 0).to(tl.int64)


# First launch


@triton.jit
def measure(
    batch, measured, settings, METHOD: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    pieces = batch.pieces
    batch = _row(batch, row)
    alpha = settings.first
    head_s = _head(batch.student, batch, BLOCK)
    head_t = _head(batch.teacher, batch, BLOCK)
    origins = Origins(head_s, head_t)
    nothing = tl.full([], _NO_MAXIMUM, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    top_s, top_t, top_x = nothing, nothing, nothing
    z_s, z_t, s_d, t_d = zero, zero, zero, zero
    w, w_d, w_dd, w_ddd = zero, zero, zero, zero
    shared = zero + _NO_MAXIMUM
    most, least = zero, zero
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, batch.vocab), BLOCK):
        s, t, d = _pair(batch, start + tl.arange(0, BLOCK), origins)
        shared = tl.maximum(shared, tl.minimum(s, t))
        most = tl.maximum(most, d)
        least = tl.minimum(least, d)
        p, top_s, fade = _weigh(s, top_s)
        z_s = z_s * fade + p
        if METHOD == "reverse_kl_symmetry":
            s_d = s_d * fade + p * d
        p, top_t, fade = _weigh(t, top_t)
        z_t = z_t * fade + p
        if METHOD == "reverse_kl_symmetry":
            t_d = t_d * fade + p * d
        if METHOD == "kl_symmetry":
            p, top_x, fade = _weigh((1 - alpha) * s + alpha * t, top_x)
            w, w_d, w_dd, w_ddd = _moment_sums(w, w_d, w_dd, w_ddd, p, d, fade)
    out = measured + row * MEASURED * pieces + piece
    tl.store(out + _TOP_STUDENT * pieces, top_s)
    tl.store(out + _TOP_TEACHER * pieces, top_t)
    tl.store(out + _TOP_X * pieces, top_x)
    tl.store(out + _HEAD_STUDENT * pieces, head_s)
    tl.store(out + _HEAD_TEACHER * pieces, head_t)
    tl.store(out + _SHARED * pieces, tl.max(shared, 0))
    tl.store(out + _Z_STUDENT * pieces, _total(z_s))
    tl.store(out + _Z_TEACHER * pieces, _total(z_t))
    tl.store(out + _STUDENT_D * pieces, _total(s_d))
    tl.store(out + _TEACHER_D * pieces, _total(t_d))
    tl.store(out + _W * pieces, _total(w))
    tl.store(out + _W_D * pieces, _total(w_d))
    tl.store(out + _W_DD * pieces, _total(w_dd))
    tl.store(out + _W_DDD * pieces, _total(w_ddd))
    tl.store(out + _MOST_D * pieces, tl.max(most, 0))
    tl.store(out + _LEAST_D * pieces, tl.min(least, 0))


@triton.jit
def _moment_sums(w, w_d, w_dd, w_ddd, p, d, fade):
    p_d = p * d
    p_dd = p_d * d
    return w * fade + p, w_d * fade + p_d, w_dd * fade + p_dd, w_ddd * fade + p_dd * d


# Second launch


@triton.jit
def _moments(w, w_d, w_dd, w_ddd, gap):
    """F', F'' and F''' from sums."""
    mean = w_d / w
    variance = w_dd / w - mean * mean
    return mean - gap, variance, w_ddd / w - mean * (3 * variance + mean * mean)


@triton.jit
def _row_moments(batch, alpha, origins, gap, BLOCK: tl.constexpr):
    """F', F'' and F''' of the whole row at one alpha."""
    weight = alpha.to(tl.float32)
    top = tl.full([], _NO_MAXIMUM, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    w = zero
    w_d = zero
    w_dd = zero
    w_ddd = zero
    for start in range(0, batch.vocab, BLOCK):
        s, t, d = _pair(batch, start + tl.arange(0, BLOCK), origins)
        p, top, fade = _weigh((1 - weight) * s + weight * t, top)
        w, w_d, w_dd, w_ddd = _moment_sums(w, w_d, w_dd, w_ddd, p, d, fade)
    return _moments(_total(w), _total(w_d), _total(w_dd), _total(w_ddd), gap)


@triton.jit
def _is_root(slope, curvature):
    return tl.abs(slope) <= tl.maximum(curvature, 1.0) * _TOLERANCE


@triton.jit
def _next(alpha, slope, curvature, third, left, right, passes):
    """`_Bracket.next`, in float32; the middle in every other pass where parabolas do not help."""
    root = tl.sqrt(tl.maximum(curvature * curvature - 2 * slope * third, 0.0))
    guess = alpha - 2 * slope / (curvature + root)
    middle = (left + right) / 2
    useful = (guess > left) & (guess < right) & ((passes < _SINGLE) | (passes % 2 == 0))
    guess = tl.where(useful, guess, middle)
    guess = tl.minimum(tl.maximum(guess, left + _TOLERANCE / 2), right - _TOLERANCE / 2)
    return guess.to(tl.float32).to(tl.float64)


@triton.jit
def _root(batch, settings, moments, known, origins, gap, BLOCK: tl.constexpr):
    """`solve_kl_symmetry`, from the moments at its first alpha; not where alpha is `known`."""
    alpha = tl.cast(settings.first, tl.float64)
    low = tl.cast(settings.low, tl.float64)
    high = tl.cast(settings.high, tl.float64)
    slope, curvature, third = moments
    left = tl.where(slope >= 0, low, alpha)
    right = tl.where(slope >= 0, alpha, high)
    done = known | _is_root(slope, curvature) | (right - left <= _TOLERANCE)
    passes = 1
    while (passes < _MAX_PASSES) & (done == 0):
        alpha = _next(alpha, slope, curvature, third, left, right, passes)
        alpha = tl.where((passes == 1) & (settings.second >= 0), settings.second, alpha)
        slope, curvature, third = _row_moments(batch, alpha, origins, gap, BLOCK)
        left = tl.where(slope >= 0, left, alpha)
        right = tl.where(slope >= 0, alpha, right)
        done = _is_root(slope, curvature) | (right - left <= _TOLERANCE)
        passes += 1
    outside = ~_is_root(slope, curvature)
    alpha = tl.where(outside & (alpha <= low) & (slope > 0), _BELOW, alpha)
    return tl.where(outside & (alpha >= high) & (slope < 0), _ABOVE, alpha)


@triton.jit
def _leads(batch, alpha, origins, gap, BLOCK: tl.constexpr):
    """Whether F(2 alpha) > F(2 alpha - 1)."""
    ahead = (2 * alpha).to(tl.float32)
    behind = (2 * alpha - 1).to(tl.float32)
    nothing = tl.full([], _NO_MAXIMUM, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    top_a = nothing
    top_b = nothing
    w_a = zero
    w_b = zero
    for start in range(0, batch.vocab, BLOCK):
        s, t, d = _pair(batch, start + tl.arange(0, BLOCK), origins)
        p, top_a, fade = _weigh(_if_shared(d, (1 - ahead) * s + ahead * t), top_a)
        w_a = w_a * fade + p
        p, top_b, fade = _weigh(_if_shared(d, (1 - behind) * s + behind * t), top_b)
        w_b = w_b * fade + p
    return tl.log(_total(w_a)) + top_a - gap > tl.log(_total(w_b)) + top_b


@triton.jit
def _balance(batch, level, origins, gap, BLOCK: tl.constexpr):
    """`ess_balance`: 1/2 where `level`, else bisected."""
    low = tl.full([], 0.0, tl.float64)
    high = tl.full([], 1.0, tl.float64)
    steps = tl.where(level, 24, 0)
    while steps < 24:
        alpha = (low + high) / 2
        leads = _leads(batch, alpha, origins, gap, BLOCK)
        low = tl.where(leads, low, alpha)
        high = tl.where(leads, alpha, high)
        steps += 1
    root = tl.minimum(tl.maximum((low + high) / 2, 1 - _NEAREST_ONE), _NEAREST_ONE)
    return tl.where(level, 0.5, root)


@triton.jit
def _reverse(to_student, to_teacher, only_s, only_t):
    """`reverse_kl_symmetry`, from the slopes of F at 1 and at 0."""
    to_student = tl.where(only_t, _INF, tl.maximum(to_student, 0.0))
    to_teacher = tl.where(only_s, _INF, tl.maximum(-to_teacher, 0.0))
    alpha = 1 / (1 + to_teacher / to_student)
    return tl.where(alpha != alpha, 0.5, alpha)


@triton.jit
def _bounded(free, settings, disjoint, forced):
    """`_choose_alpha`: within the bounds, and the teacher where there is no mixture."""
    alpha = tl.minimum(tl.maximum(free, settings.alpha_min), settings.alpha_max)
    clamped = tl.abs(alpha - free) > 1e-7
    forced = forced | (disjoint & (alpha > 0))
    return tl.where(forced, 1.0, alpha).to(tl.float32).to(tl.float64), clamped & (forced == 0)


@triton.jit
def _known(sums, pieces, WIDTH: tl.constexpr):
    """What follows from the sums of all pieces."""
    top_s, scale_s = _tops(sums, _TOP_STUDENT, pieces, WIDTH)
    top_t, scale_t = _tops(sums, _TOP_TEACHER, pieces, WIDTH)
    head_s = tl.load(sums + _HEAD_STUDENT * pieces)
    head_t = tl.load(sums + _HEAD_TEACHER * pieces)
    z_s = _sum(sums, _Z_STUDENT, pieces, scale_s, WIDTH)
    z_t = _sum(sums, _Z_TEACHER, pieces, scale_t, WIDTH)
    at_s = (head_s + top_s).to(tl.float32)
    at_t = (head_t + top_t).to(tl.float32)
    return Known(
        at_s,
        at_t,
        head_s + top_s - at_s + tl.log(z_s),
        head_t + top_t - at_t + tl.log(z_t),
        # with NaN and +inf, z is NaN
        ((top_s > -_SUPPORT_GAP) & (z_s > 0)) == 0,
        ((top_t > -_SUPPORT_GAP) & (z_t > 0)) == 0,
        tl.max(_column(sums, _SHARED, pieces, _NO_MAXIMUM, WIDTH), 0) > -_SUPPORT_GAP,
        tl.min(_column(sums, _LEAST_D, pieces, 0.0, WIDTH), 0) < -_SUPPORT_GAP,
        tl.max(_column(sums, _MOST_D, pieces, 0.0, WIDTH), 0) > _SUPPORT_GAP,
        # relative to the heads, as `measure` has taken its sums
        top_t + tl.log(z_t) - top_s - tl.log(z_s),
    )


@triton.jit
def _mean_d(sums, top_column, z_column, column, pieces, WIDTH: tl.constexpr):
    """E[d] under one model, relative to the heads."""
    _, scale = _tops(sums, top_column, pieces, WIDTH)
    z = _sum(sums, z_column, pieces, scale, WIDTH)
    return _sum(sums, column, pieces, scale, WIDTH) / z


@triton.jit
def _first_moments(sums, pieces, gap, WIDTH: tl.constexpr):
    """The derivatives of F at the alpha of `measure`."""
    _, scale = _tops(sums, _TOP_X, pieces, WIDTH)
    w = _sum(sums, _W, pieces, scale, WIDTH)
    w_d = _sum(sums, _W_D, pieces, scale, WIDTH)
    w_dd = _sum(sums, _W_DD, pieces, scale, WIDTH)
    w_ddd = _sum(sums, _W_DDD, pieces, scale, WIDTH)
    return _moments(w, w_d, w_dd, w_ddd, gap)


@triton.jit
def solve(
    batch, position, measured, solved, settings,
    METHOD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pieces = batch.pieces
    batch = _row(batch, row)
    sums = measured + row * MEASURED * pieces
    known = _known(sums, pieces, WIDTH)
    origins = Origins(known.at_student, known.at_teacher)
    gap = known.log_z_teacher - known.log_z_student
    disjoint = known.shared == 0
    useless = known.bad_student | known.bad_teacher | disjoint
    place = tl.load(position + row)

    if METHOD == "kl_symmetry":
        moments = _first_moments(sums, pieces, known.head_gap, WIDTH)
        free = _root(batch, settings, moments, useless, origins, gap, BLOCK)
        free = tl.where(settings.mirror > 0, 1 - free, free)
    elif METHOD == "reverse_kl_symmetry":
        student_d = _mean_d(sums, _TOP_STUDENT, _Z_STUDENT, _STUDENT_D, pieces, WIDTH)
        teacher_d = _mean_d(sums, _TOP_TEACHER, _Z_TEACHER, _TEACHER_D, pieces, WIDTH)
        slope_0 = student_d - known.head_gap
        slope_1 = teacher_d - known.head_gap
        free = _reverse(slope_1, slope_0, known.only_student, known.only_teacher)
    elif METHOD == "ess_balance":
        level = ((known.only_student | known.only_teacher) == 0) | useless
        free = _balance(batch, level, origins, gap, BLOCK)
    else:
        share = tl.minimum(place.to(tl.float64) / settings.tokens, 1.0)
        free = settings.start + (settings.end - settings.start) * share
    if METHOD != "schedule":
        free = tl.where(known.shared, free, 1.0)
    forced = (place == 0) & (settings.force_first > 0)
    alpha, clamped = _bounded(free, settings, disjoint, forced)

    out = solved + row * SOLVED
    tl.store(out + _ALPHA, alpha)
    tl.store(out + _CLAMPED, clamped)
    tl.store(out + _AT_STUDENT, known.at_student)
    tl.store(out + _AT_TEACHER, known.at_teacher)
    tl.store(out + _LOG_Z_STUDENT, known.log_z_student)
    tl.store(out + _LOG_Z_TEACHER, known.log_z_teacher)
    tl.store(out + _BAD_STUDENT, known.bad_student)
    tl.store(out + _BAD_TEACHER, known.bad_teacher)
    tl.store(out + _NO_STUDENT, (alpha == 1) & known.only_teacher)
    tl.store(out + _NO_TEACHER, (alpha == 0) & known.only_student)
    tl.store(out + _FALLBACK, disjoint & (alpha > 0))


# Third launch


@triton.jit
def mix(
    batch, noise, solved, mixed, HASHED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    pieces = batch.pieces
    batch = _row(batch, row)
    noise, a, b = _noise_of(noise, row, HASHED)
    known = solved + row * SOLVED
    alpha = tl.load(known + _ALPHA).to(tl.float32)
    at_s = tl.load(known + _AT_STUDENT).to(tl.float32)
    at_t = tl.load(known + _AT_TEACHER).to(tl.float32)
    origins = Origins(at_s, at_t)
    nothing = tl.full([], _NO_MAXIMUM, tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    top = nothing
    top_s = nothing
    top_t = nothing
    w = zero
    w_x = zero
    w_d = zero
    w_dd = zero
    w_s = zero
    w_t = zero
    best = zero + _NO_MAXIMUM
    best_id = tl.zeros([BLOCK], tl.int32)
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, batch.vocab), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s, t, d = _pair(batch, ids, origins)
        x = (1 - alpha) * s + alpha * t
        p, new, fade = _weigh(x, top)
        w_x = (w_x + w * (top - new)) * fade + p * (x - new)
        w = w * fade + p
        w_d = w_d * fade + p * d
        w_dd = w_dd * fade + p * d * d
        top = new
        # q^2 / p_student = exp(2 x - s)
        p, top_s, fade = _weigh(_if_shared(d, x + alpha * d), top_s)
        w_s = w_s * fade + p
        p, top_t, fade = _weigh(_if_shared(d, x - (1 - alpha) * d), top_t)
        w_t = w_t * fade + p
        score = x + _gumbel(noise, ids, ids < batch.vocab, a, b, HASHED)
        best_id = tl.where(score > best, ids, best_id)
        best = tl.maximum(best, score)
    highest = tl.max(best, 0)
    best_id = tl.min(tl.where(best == highest, best_id, 2**31 - 1), 0)
    out = mixed + row * MIXED * pieces + piece
    tl.store(out + _MIX_TOP * pieces, top)
    tl.store(out + _MIX_TOP_STUDENT * pieces, top_s)
    tl.store(out + _MIX_TOP_TEACHER * pieces, top_t)
    tl.store(out + _MIX_W * pieces, _total(w))
    tl.store(out + _MIX_W_X * pieces, _total(w_x))
    tl.store(out + _MIX_W_D * pieces, _total(w_d))
    tl.store(out + _MIX_W_DD * pieces, _total(w_dd))
    tl.store(out + _MIX_SQUARES_STUDENT * pieces, _total(w_s))
    tl.store(out + _MIX_SQUARES_TEACHER * pieces, _total(w_t))
    tl.store(out + _MIX_HIGHEST * pieces, highest)
    tl.store(out + _MIX_BEST_ID * pieces, best_id)


# Fourth launch


@triton.jit
def _log_squares(sums, top_column, column, pieces, WIDTH: tl.constexpr):
    """log of a sum of squares of q over one model, relative to both log Z."""
    top, scale = _tops(sums, top_column, pieces, WIDTH)
    return tl.log(_sum(sums, column, pieces, scale, WIDTH)) + top


@triton.jit
def _ess(log_squares, log_sum, log_z):
    """1 / sum q^2 / p, at most 1."""
    return 1 / tl.maximum(tl.exp(log_squares - 2 * log_sum + log_z), 1.0)


@triton.jit
def _log_p(logits, token, scale, at, log_z):
    """Of the drawn token under one model."""
    return (tl.load(logits + token).to(tl.float32) * scale).to(tl.float64) - at - log_z


@triton.jit
def finish(batch, solved, mixed, outputs, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pieces = batch.pieces
    batch = _row(batch, row)
    sums = mixed + row * MIXED * pieces
    known = solved + row * SOLVED
    alpha = tl.load(known + _ALPHA)
    log_z_s = tl.load(known + _LOG_Z_STUDENT)
    log_z_t = tl.load(known + _LOG_Z_TEACHER)
    bad_s = tl.load(known + _BAD_STUDENT) != 0
    bad_t = tl.load(known + _BAD_TEACHER) != 0
    no_student = tl.load(known + _NO_STUDENT) != 0
    no_teacher = tl.load(known + _NO_TEACHER) != 0
    bad = bad_s | bad_t

    top, scales = _tops(sums, _MIX_TOP, pieces, WIDTH)
    pulls = _column(sums, _MIX_TOP, pieces, _NO_MAXIMUM, WIDTH) - top
    pulled = tl.where(scales > 0, scales * pulls, 0.0)
    w = _sum(sums, _MIX_W, pieces, scales, WIDTH)
    w_x = _sum(sums, _MIX_W_X, pieces, scales, WIDTH)
    w_x += _sum(sums, _MIX_W, pieces, pulled, WIDTH)
    mean_d = _sum(sums, _MIX_W_D, pieces, scales, WIDTH) / w
    slope = mean_d - (log_z_t - log_z_s)
    variance = _sum(sums, _MIX_W_DD, pieces, scales, WIDTH) / w - mean_d * mean_d
    curvature = tl.where(no_student | no_teacher, _INF, tl.maximum(variance, 0.0))
    log_sum = tl.log(w) + top
    F = log_sum - log_z_s - alpha * (log_z_t - log_z_s)
    squares_s = _log_squares(sums, _MIX_TOP_STUDENT, _MIX_SQUARES_STUDENT, pieces, WIDTH)
    squares_t = _log_squares(sums, _MIX_TOP_TEACHER, _MIX_SQUARES_TEACHER, pieces, WIDTH)
    ess_s = tl.where(no_student, 0.0, _ess(squares_s, log_sum, log_z_s))
    ess_t = tl.where(no_teacher, 0.0, _ess(squares_t, log_sum, log_z_t))

    token = tl.where(bad, 0, _best(sums, _MIX_HIGHEST, _MIX_BEST_ID, pieces, WIDTH))
    log_p_s = _log_p(batch.student, token, batch.scale, tl.load(known + _AT_STUDENT), log_z_s)
    log_p_t = _log_p(batch.teacher, token, batch.scale, tl.load(known + _AT_TEACHER), log_z_t)
    # 0 times -inf is no part of a mixture
    log_q = tl.where(alpha < 1, (1 - alpha) * log_p_s, 0.0)
    log_q += tl.where(alpha > 0, alpha * log_p_t, 0.0)
    log_q -= F
    kl_s = tl.where(no_student, _INF, tl.maximum(alpha * slope - F, 0.0))
    kl_t = tl.where(no_teacher, _INF, tl.maximum((alpha - 1) * slope - F, 0.0))
    entropy = tl.maximum(tl.log(w) - w_x / w, 0.0)

    tl.store(outputs.token + row, token)
    tl.store(outputs.bad_student + row, bad_s)
    tl.store(outputs.bad_teacher + row, bad_t)
    nan = tl.where(bad, float("nan"), 0.0)
    out = outputs.trace + row * _TRACE_WIDTH
    tl.store(out + _TRACE_ALPHA, alpha + nan)
    tl.store(out + _TRACE_CLAMPED, tl.load(known + _CLAMPED) + nan)
    tl.store(out + _TRACE_KL_STUDENT, kl_s + nan)
    tl.store(out + _TRACE_KL_TEACHER, kl_t + nan)
    tl.store(out + _TRACE_ESS_STUDENT, ess_s + nan)
    tl.store(out + _TRACE_ESS_TEACHER, ess_t + nan)
    tl.store(out + _TRACE_ENTROPY, entropy + nan)
    tl.store(out + _TRACE_LOG_P_STUDENT, log_p_s + nan)
    tl.store(out + _TRACE_LOG_P_TEACHER, log_p_t + nan)
    tl.store(out + _TRACE_LOG_Q, log_q + nan)
    tl.store(out + _TRACE_FALLBACK, tl.load(known + _FALLBACK) + nan)
    tl.store(out + _TRACE_CURVATURE, curvature + nan)


# Drafts


@triton.jit
def draft(batch, noise, drafted, HASHED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of a row: the student's largest logit + noise."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    pieces = batch.pieces
    batch = _row(batch, row)
    noise, a, b = _noise_of(noise, row, HASHED)
    best = tl.full([BLOCK], _NO_MAXIMUM, tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, batch.vocab), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        score = _load(batch.student, ids, batch)
        score += _gumbel(noise, ids, ids < batch.vocab, a, b, HASHED)
        best_id = tl.where(score > best, ids, best_id)
        best = tl.maximum(best, score)
    highest = tl.max(best, 0)
    best_id = tl.min(tl.where(best == highest, best_id, 2**31 - 1), 0)
    out = drafted + row * DRAFTED * pieces + piece
    tl.store(out + _DRAFT_HIGHEST * pieces, highest)
    tl.store(out + _DRAFT_BEST_ID * pieces, best_id)


@triton.jit
def choose(drafted, pieces, tokens, WIDTH: tl.constexpr):
    """The draft of a row."""
    row = tl.program_id(0).to(tl.int64)
    sums = drafted + row * DRAFTED * pieces
    token = _best(sums, _DRAFT_HIGHEST, _DRAFT_BEST_ID, pieces, WIDTH)
    tl.store(tokens + row, token)
