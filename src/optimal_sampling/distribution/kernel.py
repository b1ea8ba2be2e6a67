"""The GPU programs behind `fused.py`, in Triton. Imported only where Triton is installed and used.

Four launches make a step; in the first and the third, every program takes one piece of one row:

    measure   [rows, pieces]  log Z of both models, which tokens they share, F' at the first alpha of the solver
    solve     [rows]          alpha; where `measure` does not settle it, by further looks at the whole row
    mix       [rows, pieces]  the sums of q at alpha, and the largest log q + noise
    finish    [rows]          the token and its diagnostics

So a row is read twice, and once more for every alpha that its solver looks at beyond the first. Sums are taken in
float32, lane by lane and relative to the largest term so far, and added up in float64. The pieces depend on the
vocabulary alone: a row's result has the same bits whatever rows are beside it.

Names and mathematics are those of `pair.py`, `solver.py`, `methods.py` and `step.py`.
"""

# mypy: ignore-errors
# ruff: noqa: D103, RET505
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "DRAFTED",
    "MEASURED",
    "MIXED",
    "SOLVED",
    "choose",
    "draft",
    "finish",
    "measure",
    "mix",
    "solve",
]

MEASURED, SOLVED, MIXED, DRAFTED = 16, 11, 10, 4
"""Numbers that `measure` leaves per piece, `solve` per row, `mix` and `draft` per piece."""

_INF = tl.constexpr(float("inf"))
_FLOOR = tl.constexpr(-1e18)  # below every score
_LEAST = tl.constexpr(
    -1e12
)  # stands for -inf: its multiples by any alpha have the weight 0, its third power is finite
_APART = tl.constexpr(5e11)  # d is larger where only one of the models has a token
_TOLERANCE = tl.constexpr(1e-6)
_BELOW, _ABOVE = tl.constexpr(-1.0), tl.constexpr(2.0)
_SINGLE, _LOOKS = (
    tl.constexpr(4),
    tl.constexpr(46),
)  # after 4 looks every other one halves the bracket, 20 times enough
_NEAREST_ONE = tl.constexpr(1 - 2.0**-24)

# As in noise.py, in two's complement
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX2 = tl.constexpr(0x94D049BB133111EB - 2**64)
_LOW30, _LOW31, _LOW33 = tl.constexpr(2**34 - 1), tl.constexpr(2**37 - 1), tl.constexpr(2**33 - 1)
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
    # -log1p(-v) = -log(rest) v / (1 - rest): the quotient makes good what rounding took from `rest`
    rest = 1 - v
    lost = 1 - rest
    return -tl.log(tl.where(lost == 0, v, -tl.log(rest) * (v / tl.where(lost == 0, 1.0, lost))))


@triton.jit
def _gumbel(noise, ids, inside, a, b, HASHED: tl.constexpr):
    """Noise of one tile: read, or made from the table of scrambled ids that `noise` then is."""
    read = tl.load(noise + ids, mask=inside, other=0)
    if HASHED:
        return _to_gumbel(_hash(read, a, b))
    else:
        return read


# Tiles


@triton.jit
def _load(logits, ids, inside, scale):
    """Logits of one tile, divided by the temperature; -inf beyond the row."""
    return tl.load(logits + ids, mask=inside, other=-_INF).to(tl.float32) * scale


@triton.jit
def _head(logits, vocab, scale, BLOCK: tl.constexpr):
    """Near the largest logit: the largest of the first tile. What logits are relative to until that is known."""
    ids = tl.arange(0, BLOCK)
    x = _load(logits, ids, ids < vocab, scale)
    top = tl.max(tl.where((x > _LEAST) & (x < _INF), x, _LEAST), 0)
    return tl.where(top > _LEAST, top, 0.0)


@triton.jit
def _above_least(x):
    """NaN stays."""
    return tl.maximum(x, _LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pair(student, teacher, ids, inside, scale, at_student, at_teacher):
    """Both models relative to something near their largest, and d."""
    s = _above_least(_load(student, ids, inside, scale) - at_student)
    t = _above_least(_load(teacher, ids, inside, scale) - at_teacher)
    return s, t, t - s


@triton.jit
def _weigh(x, top):
    """A tile's weights relative to the largest so far, that largest, and what older weights are to be scaled by."""
    new = tl.maximum(top, tl.max(x, 0))
    return tl.exp(x - new), new, tl.exp(top - new)


@triton.jit
def _if_shared(d, x):
    """x where both models have the token."""
    return tl.where(tl.abs(d) < _APART, x, _FLOOR)


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
    tops = _column(sums, column, pieces, _FLOOR, WIDTH)
    top = tl.max(tops, 0)
    return top, tl.exp(tops - top)


@triton.jit
def _sum(sums, column, pieces, scale, WIDTH: tl.constexpr):
    return tl.sum(_column(sums, column, pieces, 0.0, WIDTH) * scale, 0)


# First launch


@triton.jit
def measure(
    student, teacher, student_stride, teacher_stride, measured, vocab, scale, alpha,
    METHOD: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student, teacher = student + row * student_stride, teacher + row * teacher_stride
    head_s, head_t = _head(student, vocab, scale, BLOCK), _head(teacher, vocab, scale, BLOCK)
    nothing, zero = tl.full([], _FLOOR, tl.float32), tl.zeros([BLOCK], tl.float32)
    top_s, top_t, top_x = nothing, nothing, nothing
    z_s, z_t, s_d, t_d, w, w_d, w_dd, w_ddd = zero, zero, zero, zero, zero, zero, zero, zero
    shared, most, least = zero + _FLOOR, zero, zero
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, vocab), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s, t, d = _pair(student, teacher, ids, ids < vocab, scale, head_s, head_t)
        shared, most, least = (
            tl.maximum(shared, tl.minimum(s, t)),
            tl.maximum(most, d),
            tl.minimum(least, d),
        )
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
    pieces = tl.num_programs(1)
    out = measured + row * COLUMNS * pieces + piece
    tl.store(out, top_s)
    tl.store(out + pieces, top_t)
    tl.store(out + 2 * pieces, top_x)
    tl.store(out + 3 * pieces, head_s)
    tl.store(out + 4 * pieces, head_t)
    tl.store(out + 5 * pieces, tl.max(shared, 0))
    tl.store(out + 6 * pieces, _total(z_s))
    tl.store(out + 7 * pieces, _total(z_t))
    tl.store(out + 8 * pieces, _total(s_d))
    tl.store(out + 9 * pieces, _total(t_d))
    tl.store(out + 10 * pieces, _total(w))
    tl.store(out + 11 * pieces, _total(w_d))
    tl.store(out + 12 * pieces, _total(w_dd))
    tl.store(out + 13 * pieces, _total(w_ddd))
    tl.store(out + 14 * pieces, tl.max(most, 0))
    tl.store(out + 15 * pieces, tl.min(least, 0))


@triton.jit
def _moment_sums(w, w_d, w_dd, w_ddd, p, d, fade):
    p_d = p * d
    p_dd = p_d * d
    return w * fade + p, w_d * fade + p_d, w_dd * fade + p_dd, w_ddd * fade + p_dd * d


# Second launch


@triton.jit
def _moments(w, w_d, w_dd, w_ddd, gap):
    """F', F'' and F''' from sums."""
    mean, square = w_d / w, w_dd / w
    variance = square - mean * mean
    return mean - gap, variance, w_ddd / w - mean * (3 * variance + mean * mean)


@triton.jit
def _look(student, teacher, alpha, at_s, at_t, gap, vocab, scale, BLOCK: tl.constexpr):
    """F', F'' and F''' of the whole row at one alpha."""
    weight = alpha.to(tl.float32)
    top, zero = tl.full([], _FLOOR, tl.float32), tl.zeros([BLOCK], tl.float32)
    w, w_d, w_dd, w_ddd = zero, zero, zero, zero
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s, t, d = _pair(student, teacher, ids, ids < vocab, scale, at_s, at_t)
        p, top, fade = _weigh((1 - weight) * s + weight * t, top)
        w, w_d, w_dd, w_ddd = _moment_sums(w, w_d, w_dd, w_ddd, p, d, fade)
    return _moments(_total(w), _total(w_d), _total(w_dd), _total(w_ddd), gap)


@triton.jit
def _settled(slope, curvature):
    return tl.abs(slope) <= tl.maximum(curvature, 1.0) * _TOLERANCE


@triton.jit
def _next(alpha, slope, curvature, third, left, right, looks):
    """`_Bracket.next`, in float32; the middle at every other look where parabolas do not help."""
    root = tl.sqrt(tl.maximum(curvature * curvature - 2 * slope * third, 0.0))
    guess = alpha - 2 * slope / (curvature + root)
    middle = (left + right) / 2
    useful = (guess > left) & (guess < right) & ((looks < _SINGLE) | (looks % 2 == 0))
    guess = tl.where(useful, guess, middle)
    return (
        tl.minimum(tl.maximum(guess, left + _TOLERANCE / 2), right - _TOLERANCE / 2)
        .to(tl.float32)
        .to(tl.float64)
    )


@triton.jit
def _root(
    student, teacher, alpha, slope, curvature, third, low, high, also, known, at_s, at_t, gap, vocab, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`solve_kl_symmetry`, from what is known at its first alpha. `also` is looked at next unless it is negative."""
    left, right = tl.where(slope >= 0, low, alpha), tl.where(slope >= 0, alpha, high)
    done = known | _settled(slope, curvature) | (right - left <= _TOLERANCE)
    looks = 1
    while (looks < _LOOKS) & (done == 0):
        alpha = _next(alpha, slope, curvature, third, left, right, looks)
        alpha = tl.where((looks == 1) & (also >= 0), also, alpha)
        slope, curvature, third = _look(
            student, teacher, alpha, at_s, at_t, gap, vocab, scale, BLOCK
        )
        left, right = tl.where(slope >= 0, left, alpha), tl.where(slope >= 0, alpha, right)
        done = _settled(slope, curvature) | (right - left <= _TOLERANCE)
        looks += 1
    outside = ~_settled(slope, curvature)
    alpha = tl.where(outside & (alpha <= low) & (slope > 0), _BELOW, alpha)
    return tl.where(outside & (alpha >= high) & (slope < 0), _ABOVE, alpha)


@triton.jit
def _leads(student, teacher, alpha, at_s, at_t, gap, vocab, scale, BLOCK: tl.constexpr):
    """Whether F(2 alpha) > F(2 alpha - 1)."""
    ahead, behind = (2 * alpha).to(tl.float32), (2 * alpha - 1).to(tl.float32)
    nothing, zero = tl.full([], _FLOOR, tl.float32), tl.zeros([BLOCK], tl.float32)
    top_a, top_b, w_a, w_b = nothing, nothing, zero, zero
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s, t, d = _pair(student, teacher, ids, ids < vocab, scale, at_s, at_t)
        p, top_a, fade = _weigh(_if_shared(d, (1 - ahead) * s + ahead * t), top_a)
        w_a = w_a * fade + p
        p, top_b, fade = _weigh(_if_shared(d, (1 - behind) * s + behind * t), top_b)
        w_b = w_b * fade + p
    return tl.log(_total(w_a)) + top_a - gap > tl.log(_total(w_b)) + top_b


@triton.jit
def _balance(student, teacher, level, at_s, at_t, gap, vocab, scale, BLOCK: tl.constexpr):
    """`ess_balance`: bisected only where the supports differ."""
    low, high = tl.full([], 0.0, tl.float64), tl.full([], 1.0, tl.float64)
    steps = tl.where(level, 24, 0)
    while steps < 24:
        alpha = (low + high) / 2
        leads = _leads(student, teacher, alpha, at_s, at_t, gap, vocab, scale, BLOCK)
        low, high = tl.where(leads, low, alpha), tl.where(leads, alpha, high)
        steps += 1
    return tl.minimum(tl.maximum((low + high) / 2, 1 - _NEAREST_ONE), _NEAREST_ONE)


@triton.jit
def _reverse(to_student, to_teacher, only_s, only_t):
    """`reverse_kl_symmetry`, from the slopes of F at 1 and at 0."""
    to_student = tl.where(only_t, _INF, tl.maximum(to_student, 0.0))
    to_teacher = tl.where(only_s, _INF, tl.maximum(-to_teacher, 0.0))
    alpha = 1 / (1 + to_teacher / to_student)
    return tl.where(alpha != alpha, 0.5, alpha)


@triton.jit
def _bounded(free, low, high, disjoint, forced):
    """`choose_alpha`: within the bounds, and the teacher where there is no mixture."""
    alpha = tl.minimum(tl.maximum(free, low), high)
    clamped = tl.abs(alpha - free) > 1e-7
    forced = forced | (disjoint & (alpha > 0))
    return tl.where(forced, 1.0, alpha).to(tl.float32).to(tl.float64), clamped & (forced == 0)


@triton.jit
def _store_models(out, at_s, at_t, log_z_s, log_z_t, bad_s, bad_t):
    """What `mix` and `finish` need to know of both models' rows: columns 2 to 7."""
    tl.store(out, at_s)
    tl.store(out + 1, at_t)
    tl.store(out + 2, log_z_s)
    tl.store(out + 3, log_z_t)
    tl.store(out + 4, bad_s)
    tl.store(out + 5, bad_t)


@triton.jit
def solve(
    student, teacher, student_stride, teacher_stride, position, measured, solved, pieces, vocab, scale,
    first, also, low, high, alpha_min, alpha_max, start, end, tokens,
    METHOD: tl.constexpr, MIRROR: tl.constexpr, FORCE: tl.constexpr, MEASURED: tl.constexpr, SOLVED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student, teacher = student + row * student_stride, teacher + row * teacher_stride
    sums = measured + row * MEASURED * pieces
    top_s, scale_s = _tops(sums, 0, pieces, WIDTH)
    top_t, scale_t = _tops(sums, 1, pieces, WIDTH)
    head_s, head_t = tl.load(sums + 3 * pieces), tl.load(sums + 4 * pieces)
    shared = tl.max(_column(sums, 5, pieces, _FLOOR, WIDTH), 0) > -_APART
    only_t = tl.max(_column(sums, 14, pieces, 0.0, WIDTH), 0) > _APART
    only_s = tl.min(_column(sums, 15, pieces, 0.0, WIDTH), 0) < -_APART
    z_s, z_t = _sum(sums, 6, pieces, scale_s, WIDTH), _sum(sums, 7, pieces, scale_t, WIDTH)
    bad_s, bad_t = (
        ((top_s > -_APART) & (z_s > 0)) == 0,
        ((top_t > -_APART) & (z_t > 0)) == 0,
    )  # NaN and +inf: z is NaN
    # the models relative to their largest logits, in which `solve` and `mix` see them
    at_s, at_t = (head_s + top_s).to(tl.float32), (head_t + top_t).to(tl.float32)
    log_z_s, log_z_t = head_s + top_s - at_s + tl.log(z_s), head_t + top_t - at_t + tl.log(z_t)
    gap, head_gap = log_z_t - log_z_s, top_t + tl.log(z_t) - top_s - tl.log(z_s)
    place = tl.load(position + row)

    if METHOD == "kl_symmetry":
        _, scale_x = _tops(sums, 2, pieces, WIDTH)
        w, w_d = _sum(sums, 10, pieces, scale_x, WIDTH), _sum(sums, 11, pieces, scale_x, WIDTH)
        w_dd, w_ddd = _sum(sums, 12, pieces, scale_x, WIDTH), _sum(sums, 13, pieces, scale_x, WIDTH)
        slope, curvature, third = _moments(w, w_d, w_dd, w_ddd, head_gap)
        alpha = tl.cast(first, tl.float64)
        free = _root(
            student, teacher, alpha, slope, curvature, third, tl.cast(low, tl.float64), tl.cast(high, tl.float64),
            also, bad_s | bad_t | (shared == 0), at_s, at_t, gap, vocab, scale, BLOCK,
        )  # fmt: skip
        if MIRROR:
            free = 1 - free
    elif METHOD == "reverse_kl_symmetry":
        slope_0 = _sum(sums, 8, pieces, scale_s, WIDTH) / z_s - head_gap
        slope_1 = _sum(sums, 9, pieces, scale_t, WIDTH) / z_t - head_gap
        free = _reverse(slope_1, slope_0, only_s, only_t)
    elif METHOD == "ess_balance":
        level = ((only_s | only_t) == 0) | (shared == 0) | bad_s | bad_t
        free = tl.where(
            level, 0.5, _balance(student, teacher, level, at_s, at_t, gap, vocab, scale, BLOCK)
        )
    else:
        free = start + (end - start) * tl.minimum(place.to(tl.float64) / tokens, 1.0)
    if METHOD != "schedule":
        free = tl.where(shared, free, 1.0)
    forced = (place == 0) & FORCE
    alpha, clamped = _bounded(free, alpha_min, alpha_max, shared == 0, forced)

    out = solved + row * SOLVED
    _store_models(out + 2, at_s, at_t, log_z_s, log_z_t, bad_s, bad_t)
    tl.store(out, alpha)
    tl.store(out + 1, clamped)
    tl.store(out + 8, (alpha == 1) & only_t)
    tl.store(out + 9, (alpha == 0) & only_s)
    tl.store(out + 10, (shared == 0) & (alpha > 0))


# Third launch


@triton.jit
def mix(
    student, teacher, student_stride, teacher_stride, noise, noise_stride, keys, position, solved, mixed, vocab, scale,
    HASHED: tl.constexpr, SOLVED: tl.constexpr, MIXED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student, teacher, noise = (
        student + row * student_stride,
        teacher + row * teacher_stride,
        noise + row * noise_stride,
    )
    a, b = 0, 0
    if HASHED:
        a, b = _words(keys + row, position + row)
    alpha = tl.load(solved + row * SOLVED).to(tl.float32)
    at_s, at_t = (
        tl.load(solved + row * SOLVED + 2).to(tl.float32),
        tl.load(solved + row * SOLVED + 3).to(tl.float32),
    )
    nothing, zero = tl.full([], _FLOOR, tl.float32), tl.zeros([BLOCK], tl.float32)
    top, top_s, top_t = nothing, nothing, nothing
    w, w_x, w_d, w_s, w_t = zero, zero, zero, zero, zero
    best, best_id = zero + _FLOOR, tl.zeros([BLOCK], tl.int32)
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, vocab), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s, t, d = _pair(student, teacher, ids, ids < vocab, scale, at_s, at_t)
        x = (1 - alpha) * s + alpha * t
        p, new, fade = _weigh(x, top)
        w_x = (w_x + w * (top - new)) * fade + p * (x - new)
        w, w_d, top = w * fade + p, w_d * fade + p * d, new
        p, top_s, fade = _weigh(
            _if_shared(d, x + alpha * d), top_s
        )  # q^2 / p_student = exp(2 x - s)
        w_s = w_s * fade + p
        p, top_t, fade = _weigh(_if_shared(d, x - (1 - alpha) * d), top_t)
        w_t = w_t * fade + p
        score = x + _gumbel(noise, ids, ids < vocab, a, b, HASHED)
        best, best_id = tl.maximum(best, score), tl.where(score > best, ids, best_id)
    highest = tl.max(best, 0)
    pieces = tl.num_programs(1)
    out = mixed + row * MIXED * pieces + piece
    tl.store(out, top)
    tl.store(out + pieces, top_s)
    tl.store(out + 2 * pieces, top_t)
    tl.store(out + 3 * pieces, _total(w))
    tl.store(out + 4 * pieces, _total(w_x))
    tl.store(out + 5 * pieces, _total(w_d))
    tl.store(out + 6 * pieces, _total(w_s))
    tl.store(out + 7 * pieces, _total(w_t))
    tl.store(out + 8 * pieces, highest)
    tl.store(out + 9 * pieces, tl.min(tl.where(best == highest, best_id, 2**31 - 1), 0))


# Fourth launch


@triton.jit
def _ess(sums, column, pieces, log_sum, log_z, WIDTH: tl.constexpr):
    """1 / sum q^2 / p, at most 1."""
    top, scale = _tops(sums, column, pieces, WIDTH)
    total = _sum(sums, column + 5, pieces, scale, WIDTH)
    return 1 / tl.maximum(tl.exp(tl.log(total) + top - 2 * log_sum + log_z), 1.0)


@triton.jit
def _log_p(logits, token, scale, at, log_z):
    """Of the drawn token under one model."""
    return (tl.load(logits + token).to(tl.float32) * scale).to(tl.float64) - at - log_z


@triton.jit
def finish(
    student, teacher, student_stride, teacher_stride, solved, mixed, tokens, trace, bad_student, bad_teacher,
    pieces, scale,
    SOLVED: tl.constexpr, MIXED: tl.constexpr, FIELDS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sums, known = mixed + row * MIXED * pieces, solved + row * SOLVED
    alpha, log_z_s, log_z_t = tl.load(known), tl.load(known + 4), tl.load(known + 5)
    bad_s, bad_t = tl.load(known + 6) != 0, tl.load(known + 7) != 0
    no_student, no_teacher = tl.load(known + 8) != 0, tl.load(known + 9) != 0
    bad = bad_s | bad_t

    top, scales = _tops(sums, 0, pieces, WIDTH)
    pulls = _column(sums, 0, pieces, _FLOOR, WIDTH) - top
    w = _sum(sums, 3, pieces, scales, WIDTH)
    w_x = _sum(sums, 4, pieces, scales, WIDTH)
    w_x += tl.sum(
        _column(sums, 3, pieces, 0.0, WIDTH) * tl.where(scales > 0, scales * pulls, 0.0), 0
    )
    slope = _sum(sums, 5, pieces, scales, WIDTH) / w - (log_z_t - log_z_s)
    log_sum = tl.log(w) + top
    F = log_sum - log_z_s - alpha * (log_z_t - log_z_s)

    highest, every = _column(sums, 8, pieces, -_INF, WIDTH), tl.arange(0, WIDTH)
    ids = _column(sums, 9, pieces, 0.0, WIDTH)
    token = tl.min(
        tl.where((highest == tl.max(highest, 0)) & (every < pieces), ids, 2.0**31 - 1), 0
    ).to(tl.int64)
    token = tl.where(bad, 0, token)
    log_p_s = _log_p(student + row * student_stride, token, scale, tl.load(known + 2), log_z_s)
    log_p_t = _log_p(teacher + row * teacher_stride, token, scale, tl.load(known + 3), log_z_t)
    # 0 times -inf is no part of a mixture
    log_q = (
        tl.where(alpha < 1, (1 - alpha) * log_p_s, 0.0)
        + tl.where(alpha > 0, alpha * log_p_t, 0.0)
        - F
    )

    tl.store(tokens + row, token)
    tl.store(bad_student + row, bad_s)
    tl.store(bad_teacher + row, bad_t)
    nan, out = tl.where(bad, float("nan"), 0.0), trace + row * FIELDS
    tl.store(out, alpha + nan)
    tl.store(out + 1, tl.load(known + 1) + nan)
    tl.store(out + 2, tl.where(no_student, _INF, tl.maximum(alpha * slope - F, 0.0)) + nan)
    tl.store(out + 3, tl.where(no_teacher, _INF, tl.maximum((alpha - 1) * slope - F, 0.0)) + nan)
    tl.store(
        out + 4, tl.where(no_student, 0.0, _ess(sums, 1, pieces, log_sum, log_z_s, WIDTH)) + nan
    )
    tl.store(
        out + 5, tl.where(no_teacher, 0.0, _ess(sums, 2, pieces, log_sum, log_z_t, WIDTH)) + nan
    )
    tl.store(out + 6, tl.maximum(tl.log(w) - w_x / w, 0.0) + nan)
    tl.store(out + 7, log_p_s + nan)
    tl.store(out + 8, log_p_t + nan)
    tl.store(out + 9, log_q + nan)
    tl.store(out + 10, tl.load(known + 10) + nan)


# Drafts


@triton.jit
def draft(
    student, student_stride, noise, noise_stride, keys, position, drafted, vocab, scale,
    HASHED: tl.constexpr, DRAFTED: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of a row: log Z, and the largest logit + noise."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student, noise = student + row * student_stride, noise + row * noise_stride
    a, b = 0, 0
    if HASHED:
        a, b = _words(keys + row, position + row)
    top, z = tl.full([], _FLOOR, tl.float32), tl.zeros([BLOCK], tl.float32)
    best, best_id = z + _FLOOR, tl.zeros([BLOCK], tl.int32)
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, vocab), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s = _load(student, ids, ids < vocab, scale)
        p, top, fade = _weigh(s, top)
        z = z * fade + p
        score = s + _gumbel(noise, ids, ids < vocab, a, b, HASHED)
        best, best_id = tl.maximum(best, score), tl.where(score > best, ids, best_id)
    highest = tl.max(best, 0)
    pieces = tl.num_programs(1)
    out = drafted + row * DRAFTED * pieces + piece
    tl.store(out, top)
    tl.store(out + pieces, _total(z))
    tl.store(out + 2 * pieces, highest)
    tl.store(out + 3 * pieces, tl.min(tl.where(best == highest, best_id, 2**31 - 1), 0))


@triton.jit
def choose(
    student, student_stride, drafted, tokens, log_p, pieces, scale,
    DRAFTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The draft of a row and its log p."""
    row = tl.program_id(0).to(tl.int64)
    sums, every = drafted + row * DRAFTED * pieces, tl.arange(0, WIDTH)
    top, scales = _tops(sums, 0, pieces, WIDTH)
    highest, ids = _column(sums, 2, pieces, -_INF, WIDTH), _column(sums, 3, pieces, 0.0, WIDTH)
    token = tl.min(
        tl.where((highest == tl.max(highest, 0)) & (every < pieces), ids, 2.0**31 - 1), 0
    ).to(tl.int64)
    tl.store(tokens + row, token)
    tl.store(
        log_p + row,
        _log_p(
            student + row * student_stride,
            token,
            scale,
            top,
            tl.log(_sum(sums, 1, pieces, scales, WIDTH)),
        ),
    )
