"""The same mathematics for one row in plain Python floats: slow, literal, the oracle of the tests.

Shares no code with the rest of the folder. Rows are lists of float, -inf allowed. Where a fast
function works on many rows, noise or devices, this one has a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optimal_sampling.config import MixtureConfig

__all__ = ["Naive", "log_q", "log_softmax", "naive_step", "solve"]

_INF = math.inf
_EPSILON = 1e-12  # how close to 0 and 1 an alpha of the open interval can come


def log_sum_exp(values: Sequence[float]) -> float:
    """log sum exp; -inf for nothing."""
    top = max(values, default=-_INF)
    return top if top == -_INF else top + math.log(math.fsum(math.exp(v - top) for v in values))


def log_softmax(scores: Sequence[float]) -> list[float]:
    """Normalised; a row of -inf stays one."""
    log_z = log_sum_exp(scores)
    return [s if log_z == -_INF else s - log_z for s in scores]


def largest(scores: Sequence[float], top_k: int, top_p: float) -> set[int]:
    """Ids of the k likeliest, then of the fewest that hold mass p; equal scores by id."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    order = order[: len(order) if top_k < 0 else top_k]
    log_p = log_softmax([scores[i] for i in order])
    kept: set[int] = set()
    mass = 0.0
    for i, value in zip(order, log_p, strict=True):
        if top_p < 1 and mass >= top_p and kept:
            break
        kept.add(i)
        mass += math.exp(value)
    return kept


def restrict(scores: Sequence[float], keep: set[int]) -> list[float]:
    """-inf outside of `keep`."""
    return [s if i in keep else -_INF for i, s in enumerate(scores)]


def common(s: Sequence[float], t: Sequence[float]) -> list[int]:
    """Ids possible under both models."""
    return [i for i in range(len(s)) if s[i] > -_INF and t[i] > -_INF]


def F(s: Sequence[float], t: Sequence[float], alpha: float) -> float:
    """log of the sum of p_student^(1-alpha) p_teacher^alpha over the common support."""
    return log_sum_exp([(1 - alpha) * s[i] + alpha * t[i] for i in common(s, t)])


def log_q(s: Sequence[float], t: Sequence[float], alpha: float) -> list[float]:
    """The mixture: the student for alpha = 0, the teacher for 1, else on the common support.

    The teacher where that is empty.
    """
    if alpha == 0:
        return list(s)
    if alpha == 1 or not common(s, t):
        return list(t)
    log_z, both = F(s, t, alpha), set(common(s, t))
    return [
        (1 - alpha) * s[i] + alpha * t[i] - log_z if i in both else -_INF for i in range(len(s))
    ]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p||q) of two rows of log-probabilities."""
    return math.fsum(
        math.exp(a) * (a - b) if b > -_INF else _INF for a, b in zip(p, q, strict=True) if a > -_INF
    )


def ess(q: Sequence[float], p: Sequence[float]) -> float:
    """1 / sum q^2 / p."""
    terms = [2 * a - b if b > -_INF else _INF for a, b in zip(q, p, strict=True) if a > -_INF]
    return 0.0 if _INF in terms else math.exp(-log_sum_exp(terms))


def shannon(q: Sequence[float]) -> float:
    """H(q), nats."""
    return -math.fsum(math.exp(a) * a for a in q if a > -_INF)


def variance(q: Sequence[float], s: Sequence[float], t: Sequence[float]) -> float:
    """Var_q[t - s]; infinite where only one of the models has a token of q."""
    d = [(math.exp(q[i]), t[i] - s[i]) for i in range(len(q)) if q[i] > -_INF]
    if any(math.isinf(each) for _, each in d):
        return _INF
    mean = math.fsum(p * each for p, each in d)
    return math.fsum(p * (each - mean) ** 2 for p, each in d)


def bisect(
    rising: Callable[[float], float], low: float = _EPSILON, high: float = 1 - _EPSILON
) -> float:
    """Where a rising function crosses 0; an end where it does not."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def slope(s: Sequence[float], t: Sequence[float], alpha: float) -> float:
    """F' = E_q[log p_teacher - log p_student] on the common support."""
    q = log_q(s, t, alpha)
    return math.fsum(math.exp(q[i]) * (t[i] - s[i]) for i in common(s, t))


def kl_symmetry(
    s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig
) -> float:
    """KL(q||s) = KL(q||t)."""
    return bisect(lambda alpha: slope(s, t, alpha))


def mirror(s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig) -> float:
    """1 - alpha of kl_symmetry."""
    return 1 - kl_symmetry(s, t, position, mixture)


def reverse_kl_symmetry(
    s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig
) -> float:
    """KL(s||q) = KL(t||q), from its closed form."""
    to_student, to_teacher = kl(t, s), kl(s, t)
    if to_student == to_teacher:
        return 0.5
    return 1.0 if to_student == _INF else to_student / (to_student + to_teacher)


def ess_balance(
    s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig
) -> float:
    """ESS to the student = ESS to the teacher."""

    def lead(alpha: float) -> float:
        q = log_q(s, t, alpha)
        return (
            math.log(ess(q, t)) - math.log(ess(q, s))
            if min(ess(q, t), ess(q, s)) > 0
            else alpha - 0.5
        )

    return bisect(lead)


def entropy(s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig) -> float:
    """argmax of H over the allowed mixtures, on a fine grid."""
    low, high = max(mixture.alpha_min, _EPSILON), min(mixture.alpha_max, 1 - _EPSILON)
    return max(
        (low + (high - low) * i / 400 for i in range(401)),
        key=lambda alpha: shannon(log_q(s, t, alpha)),
    )


def fixed(s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig) -> float:
    """The config's alpha."""
    return mixture.fixed_alpha


def trust_region(
    s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig
) -> float:
    """The largest alpha with KL(q||s) within the limit."""
    if kl(t, s) <= mixture.trust_region:
        return 1.0
    return bisect(lambda alpha: kl(log_q(s, t, alpha), s) - mixture.trust_region)


def schedule(
    s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig
) -> float:
    """Linear in the position."""
    share = min(position / mixture.schedule_tokens, 1.0)
    return (1 - share) * mixture.schedule_start + share * mixture.schedule_end


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
    )
}


def solve(
    s: Sequence[float], t: Sequence[float], position: int, mixture: MixtureConfig
) -> tuple[float, bool, bool]:
    """alpha, whether a bound moved it, whether the supports do not meet."""
    if mixture.force_first_token and position == 0:
        return 1.0, False, not common(s, t)
    if not common(s, t):
        blind = mixture.alpha_method in ("fixed", "schedule")
        free = NAIVE_METHODS[mixture.alpha_method](s, t, position, mixture) if blind else 1.0
        chosen = min(max(free, mixture.alpha_min), mixture.alpha_max)
        return (0.0, False, False) if chosen == 0 and max(s) > -_INF else (1.0, False, True)
    free = NAIVE_METHODS[mixture.alpha_method](s, t, position, mixture)
    alpha = min(max(free, mixture.alpha_min), mixture.alpha_max)
    return alpha, abs(alpha - free) > 1e-7, False


@dataclass(frozen=True)
class Naive:
    """What `naive_step` finds: the token, the trace by name, and the distribution drawn from."""

    token: int
    trace: dict[str, float]
    log_drawn: list[float]


def prepare(
    student: Sequence[float], teacher: Sequence[float], mixture: MixtureConfig
) -> tuple[list[float], list[float]]:
    """Log-probabilities at the temperature, on the teacher's support."""
    s, t = ([x / mixture.temperature for x in row] for row in (student, teacher))
    keep = largest(t, mixture.teacher_support_top_k, mixture.teacher_support_top_p)
    return log_softmax(restrict(s, keep)), log_softmax(restrict(t, keep))


def naive_step(
    student: Sequence[float],
    teacher: Sequence[float],
    noise: Sequence[float],
    position: int,
    mixture: MixtureConfig,
    alpha: float | None = None,
) -> Naive:
    """`distribution.step` for one good row; with `alpha` given, for that one."""
    s, t = prepare(student, teacher, mixture)
    solved, clamped, fallback = solve(s, t, position, mixture)
    alpha = solved if alpha is None else alpha
    q = log_q(s, t, alpha)
    drawn = log_softmax(restrict(q, largest(q, mixture.top_k, mixture.top_p)))
    token = max(range(len(q)), key=lambda i: (drawn[i] + noise[i], -i))
    trace = {
        "alpha": alpha,
        "clamped": float(clamped),
        "kl_student": kl(q, s),
        "kl_teacher": kl(q, t),
        "ess_student": ess(q, s),
        "ess_teacher": ess(q, t),
        "entropy": shannon(q),
        "log_p_student": s[token],
        "log_p_teacher": t[token],
        "log_q": drawn[token],
        "fallback": float(fallback),
        "curvature": variance(q, s, t),
    }
    return Naive(token, trace, drawn)
