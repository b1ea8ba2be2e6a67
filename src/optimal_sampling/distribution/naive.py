"""The same mathematics for one row in plain Python floats: slow, literal, the oracle of the tests.

Shares no code with the rest of the folder. Rows are lists of float, -inf allowed. Where a fast
function works on many rows, noise or devices, this one has a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, fsum, inf, log, nan
from typing import TypeAlias

from optimal_sampling.config import MixtureConfig

__all__ = [
    "NAIVE_METHODS",
    "NAIVE_RULES",
    "Naive",
    "kl",
    "log_q",
    "log_softmax",
    "naive_step",
    "prepare",
    "slope",
]

Row: TypeAlias = Sequence[float]
"""One number per token id."""

_EPSILON = 1e-12  # how close to 0 and 1 an alpha of the open interval can come


@dataclass(frozen=True)
class Position:
    """What a method chooses alpha from: log-probabilities `s` of the student, `t` of the teacher.

    `index` is that of the token in its completion, 0 for the first.
    """

    s: Row
    t: Row
    index: int
    mixture: MixtureConfig


def log_sum_exp(values: Row) -> float:
    """log sum exp; -inf for nothing."""
    top = max(values, default=-inf)
    if top == -inf:
        return top
    total = fsum(exp(value - top) for value in values)
    return top + log(total)


def log_softmax(scores: Row) -> list[float]:
    """Normalised; a row of -inf stays one."""
    log_z = log_sum_exp(scores)
    if log_z == -inf:
        return list(scores)
    return [score - log_z for score in scores]


def largest(scores: Row, top_k: int, top_p: float) -> set[int]:
    """Ids of the k likeliest, then of the fewest that hold mass p; equal scores by id."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if top_k >= 0:
        order = order[:top_k]
    log_p = log_softmax([scores[i] for i in order])
    kept: set[int] = set()
    mass = 0.0
    for i, value in zip(order, log_p, strict=True):
        if kept and top_p < 1 and mass >= top_p:
            break
        kept.add(i)
        mass += exp(value)
    return kept


def likely(scores: Row, min_p: float | None) -> set[int]:
    """Ids with p >= min_p times the largest p; all of them for None."""
    if min_p is None:
        return set(range(len(scores)))
    least = max(scores) + log(min_p)
    return {i for i, score in enumerate(scores) if score >= least}


def restrict(scores: Row, keep: set[int]) -> list[float]:
    """Log-probabilities of what is left: -inf outside of `keep`."""
    kept = [score if i in keep else -inf for i, score in enumerate(scores)]
    return log_softmax(kept)


def common(s: Row, t: Row) -> set[int]:
    """Ids possible under both models."""
    return {i for i in range(len(s)) if min(s[i], t[i]) > -inf}


def log_q(s: Row, t: Row, alpha: float) -> list[float]:
    """The mixture: the student for alpha = 0, the teacher for 1, else on the common support.

    The teacher where that is empty.
    """
    both = common(s, t)
    if alpha == 0:
        return list(s)
    if alpha == 1 or not both:
        return list(t)
    scores = [-inf] * len(s)
    for i in both:
        scores[i] = (1 - alpha) * s[i] + alpha * t[i]
    return log_softmax(scores)


def kl(p: Row, q: Row) -> float:
    """KL(p||q) of two rows of log-probabilities."""
    terms = []
    for a, b in zip(p, q, strict=True):
        if a > -inf:
            terms.append(exp(a) * (a - b))
    return fsum(terms)


def ess(q: Row, p: Row) -> float:
    """1 / sum q^2 / p."""
    terms = []
    for a, b in zip(q, p, strict=True):
        if a > -inf:
            terms.append(2 * a - b)
    if inf in terms:
        return 0.0
    return exp(-log_sum_exp(terms))


def shannon(q: Row) -> float:
    """H(q), nats."""
    terms = [exp(a) * a for a in q if a > -inf]
    return -fsum(terms)


def variance(q: Row, s: Row, t: Row) -> float:
    """Var_q[t - s]; infinite where only one of the models has a token of q."""
    weights = []
    differences = []
    for i in range(len(q)):
        if q[i] > -inf:
            weights.append(exp(q[i]))
            differences.append(t[i] - s[i])
    if inf in map(abs, differences):
        return inf
    mean = fsum(p * d for p, d in zip(weights, differences, strict=True))
    return fsum(p * (d - mean) ** 2 for p, d in zip(weights, differences, strict=True))


def slope(s: Row, t: Row, alpha: float) -> float:
    """F' = E_q[log p_teacher - log p_student] on the common support."""
    q = log_q(s, t, alpha)
    terms = []
    for i in common(s, t):
        d = t[i] - s[i]
        terms.append(exp(q[i]) * d)
    return fsum(terms)


def bisect(rising: Callable[[float], float]) -> float:
    """Where a rising function crosses 0 between 0 and 1; an end where it does not."""
    low = _EPSILON
    high = 1 - _EPSILON
    for _ in range(50):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def kl_symmetry(at: Position) -> float:
    """KL(q||s) = KL(q||t)."""
    return bisect(lambda alpha: slope(at.s, at.t, alpha))


def mirror(at: Position) -> float:
    """1 - alpha of kl_symmetry."""
    return 1 - kl_symmetry(at)


def reverse_kl_symmetry(at: Position) -> float:
    """KL(s||q) = KL(t||q), from its closed form."""
    to_student = kl(at.t, at.s)
    to_teacher = kl(at.s, at.t)
    if to_student == to_teacher:
        return 0.5
    if to_student == inf:
        return 1.0
    return to_student / (to_student + to_teacher)


def ess_balance(at: Position) -> float:
    """ESS to the student = ESS to the teacher."""

    def lead(alpha: float) -> float:
        q = log_q(at.s, at.t, alpha)
        to_student = ess(q, at.s)
        to_teacher = ess(q, at.t)
        if min(to_student, to_teacher) == 0:
            return alpha - 0.5
        return log(to_teacher) - log(to_student)

    return bisect(lead)


def entropy(at: Position) -> float:
    """argmax of H over the allowed mixtures: of a fine grid, then ever closer around it."""

    def height(alpha: float) -> float:
        return shannon(log_q(at.s, at.t, alpha))

    low = max(at.mixture.alpha_min, _EPSILON)
    high = min(at.mixture.alpha_max, 1 - _EPSILON)
    step = (high - low) / 400
    best = max((low + step * i for i in range(401)), key=height)
    left, right = max(low, best - step), min(high, best + step)
    for _ in range(30):
        third = (right - left) / 3
        if height(left + third) < height(right - third):
            left += third
        else:
            right -= third
    return (left + right) / 2


def fixed(at: Position) -> float:
    """The config's alpha."""
    return at.mixture.fixed_alpha


def trust_region(at: Position) -> float:
    """The largest alpha with KL(q||s) within the limit."""
    limit = at.mixture.trust_region
    if kl(at.t, at.s) <= limit:
        return 1.0

    def excess(alpha: float) -> float:
        q = log_q(at.s, at.t, alpha)
        return kl(q, at.s) - limit

    return bisect(excess)


def schedule(at: Position) -> float:
    """Linear in the position."""
    mixture = at.mixture
    share = min(at.index / mixture.schedule_tokens, 1.0)
    return (1 - share) * mixture.schedule_start + share * mixture.schedule_end


def veto(at: Position) -> float:
    """The student; `prepare` has cut it to what the teacher finds plausible."""
    return 0.0


NAIVE_METHODS = {
    method.__name__: method
    for method in (
        kl_symmetry,
        mirror,
        reverse_kl_symmetry,
        ess_balance,
        entropy,
        fixed,
        trust_region,
        schedule,
        veto,
    )
}


def interleaved(at: Position) -> tuple[list[float], float]:
    """p_student on S, and what it has outside of S drawn from the teacher."""
    keep = largest(at.t, at.mixture.interleaved_top_k, 1.0)
    if at.mixture.interleaved_min_p is not None:
        keep = likely(at.t, at.mixture.interleaved_min_p)
    keep &= {i for i in range(len(at.t)) if at.t[i] > -inf}
    outside = log_sum_exp([a for i, a in enumerate(at.s) if i not in keep])
    q = []
    for i in range(len(at.s)):
        own = at.s[i] if i in keep else -inf
        q.append(log_sum_exp([own, outside + at.t[i]]))
    return q, exp(outside)


def arithmetic(at: Position) -> tuple[list[float], float]:
    """A weighted mean of the probabilities."""
    weight = at.mixture.arithmetic_weight
    q = []
    for a, b in zip(at.s, at.t, strict=True):
        own = a + log(1 - weight) if weight < 1 else -inf
        other = b + log(weight) if weight > 0 else -inf
        q.append(log_sum_exp([own, other]))
    return q, 0.0


NAIVE_RULES = {rule.__name__: rule for rule in (interleaved, arithmetic)}
"""log q, and the student's mass in whose place a token of the teacher is drawn."""


def solve(at: Position) -> tuple[float, bool, bool]:
    """alpha, whether a bound moved it, whether q is the teacher as the supports do not meet."""
    mixture = at.mixture
    disjoint = not common(at.s, at.t)
    if mixture.force_first_token and at.index == 0:
        return 1.0, False, disjoint
    free = 1.0
    if not disjoint or mixture.alpha_method in ("fixed", "schedule"):
        free = NAIVE_METHODS[mixture.alpha_method](at)
    alpha = free
    if mixture.alpha_method != "veto":
        alpha = min(max(free, mixture.alpha_min), mixture.alpha_max)
    if not disjoint:
        return alpha, abs(alpha - free) > 1e-7, False
    if alpha == 0 and max(at.s) > -inf:
        return 0.0, False, False
    return 1.0, False, True


@dataclass(frozen=True)
class Naive:
    """What `naive_step` finds: the token, the trace by name, and the distribution drawn from."""

    token: int
    trace: dict[str, float]
    log_drawn: list[float]


def scaled(logits: Row, mixture: MixtureConfig) -> list[float]:
    """Log-probabilities at the temperature."""
    return log_softmax([logit / mixture.temperature for logit in logits])


def support(t: Row, mixture: MixtureConfig) -> set[int]:
    """Ids that both models are restricted to, from the teacher's log-probabilities."""
    keep = largest(t, mixture.teacher_support_top_k, mixture.teacher_support_top_p)
    keep &= likely(t, mixture.teacher_support_min_p)
    if mixture.alpha_method == "veto":
        keep &= likely(t, mixture.veto_min_p)
    return keep


def prepare(student: Row, teacher: Row, mixture: MixtureConfig) -> tuple[list[float], list[float]]:
    """Log-probabilities at the temperature, on the teacher's support."""
    s, t = scaled(student, mixture), scaled(teacher, mixture)
    keep = support(t, mixture)
    return restrict(s, keep), restrict(t, keep)


def mix(at: Position, alpha: float | None) -> tuple[list[float], dict[str, float]]:
    """log q, and what the trace says of how it was chosen; with `alpha` given, at that one."""
    mixture = at.mixture
    if mixture.alpha_method in NAIVE_RULES:
        nothing = max(at.s) == -inf
        if nothing or (mixture.force_first_token and at.index == 0):
            q, outside = list(at.t), nan
            if not nothing:
                outside = NAIVE_RULES[mixture.alpha_method](at)[1]
            return q, {"alpha": 1.0, "clamped": 0.0, "fallback": float(nothing), "left": outside}
        q, outside = NAIVE_RULES[mixture.alpha_method](at)
        return q, {"alpha": nan, "clamped": 0.0, "fallback": 0.0, "left": outside}
    solved, clamped, fallback = solve(at)
    alpha = solved if alpha is None else alpha
    how = {"alpha": alpha, "clamped": float(clamped), "fallback": float(fallback), "left": 0.0}
    return log_q(at.s, at.t, alpha), how


def naive_step(
    student: Row,
    teacher: Row,
    noise: Row,
    position: int,
    mixture: MixtureConfig,
    alpha: float | None = None,
) -> Naive:
    """`distribution.step` for one good row; with `alpha` given, for that one."""
    whole_s, whole_t = scaled(student, mixture), scaled(teacher, mixture)
    keep = support(whole_t, mixture)
    s, t = restrict(whole_s, keep), restrict(whole_t, keep)
    q, how = mix(Position(s, t, position, mixture), alpha)
    left = how.pop("left")
    drawn = restrict(q, largest(q, mixture.top_k, mixture.top_p))
    noisy = [a + b for a, b in zip(drawn, noise, strict=True)]
    token = noisy.index(max(noisy))
    mass = exp(log_sum_exp([whole_s[i] for i in keep]))
    trace = how | {
        "kl_student": kl(q, whole_s),
        "kl_teacher": kl(q, whole_t),
        "ess_student": ess(q, whole_s),
        "ess_teacher": ess(q, whole_t),
        "entropy": shannon(q),
        "log_p_student": whole_s[token],
        "log_p_teacher": whole_t[token],
        "log_q": drawn[token],
        "curvature": variance(q, s, t),
        "vetoed": 1 - mass + (mass * left if mass > 0 else 0.0),
        "kl_student_restricted": kl(q, s),
        "kl_teacher_restricted": kl(q, t),
        "log_p_student_restricted": s[token],
    }
    return Naive(token, trace, drawn)
