"""The plan: a YAML file as typed values, and the folder of results that it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from optimal_sampling.config import Checked, MixtureConfig, PromptConfig
from optimal_sampling.errors import ConfigError, RunFolderError, did_you_mean
from optimal_sampling.generate.recipes import RECIPES, Recipe
from optimal_sampling.records.store import read_json, write_atomically

__all__ = [
    "DEFAULT_PLAN",
    "METRICS",
    "SHARPNESS",
    "Arm",
    "Pair",
    "Plan",
    "Unit",
    "claim_folder",
    "given_pair",
    "load_plan",
    "plan_of_folder",
]

DEFAULT_PLAN = Path(__file__).with_name("plan.yaml")

SHARPNESS: dict[str, dict[str, float]] = {
    "T = 1": {},
    "T = 0.5": {"temperature": 0.5},
    "greedy": {"top_k": 1},
}
"""How the text is drawn: options of the mixture, which hold in every mode."""

METRICS = {"sampled": "T = 1", "greedy": "greedy"}
"""Accuracies after training, and what they are called."""

MOST_COUNTED = 35
"""Most samples of a problem, and tries."""

_SECTIONS = ("problems", "text", "sft", "tuning", "evaluation", "seeds", "criteria")
_OPTIONAL = ("learning_rate", "trials")  # what `tune` finds

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Arm:
    """A kind of text."""

    name: str
    title: str
    mode: Literal["mixture", "student", "teacher", "reference", "none"] = "mixture"
    """`reference`: the solutions of the dataset; `none`: the student is not trained."""
    sharpness: str = ""
    """A name of SHARPNESS; "" where nothing is drawn."""
    mixture: Mapping[str, Any] = field(default_factory=dict)
    """Options of MixtureConfig."""
    prompt: Mapping[str, Any] = field(default_factory=dict)
    """Options of PromptConfig."""
    tries: int = 1
    """Completions per problem, of which the first right one is kept."""
    group: Literal["main", "extra"] = "extra"
    diversity: bool = False
    """pass@k and distinct right texts are measured in the main profile too."""
    rounds: int = 1
    """Rounds of drawing and training, each from the student of the one before."""
    token_share: float = 1.0
    """Share of the plan's tokens to train on in each round."""
    self_teacher: bool = False
    """The student's weights are also the teacher."""
    recipe: Recipe | None = None
    """Stages of `generate`; `tries` are then those of the student's stage."""
    solution: str = "solution"
    """Column of the reference solutions."""

    @property
    def mixture_options(self) -> dict[str, Any]:
        """Options of MixtureConfig, those of the sharpness included."""
        return {**self.mixture, **SHARPNESS.get(self.sharpness, {})}

    @property
    def needs_teacher(self) -> bool:
        """Whether what is drawn depends on the pair's teacher."""
        return self.mode in ("mixture", "teacher") and not self.self_teacher


@dataclass(frozen=True)
class Pair:
    """A teacher and a student. A teacher given as a mapping is trained (`pairs.py`)."""

    name: str
    title: str
    teacher: str | Mapping[str, Any]
    student: str

    def teacher_model(self, output: Path) -> str:
        """Its name, or its folder below a folder of results."""
        if isinstance(self.teacher, str):
            return self.teacher
        return str(output / "models" / f"{self.name}-teacher")


@dataclass(frozen=True)
class Unit:
    """One arm of one pair with one seed: what is run, and kept in a folder of its own."""

    pair: str
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        """Below the folder of results."""
        return Path("units") / self.pair / self.arm / f"seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What `plan.yaml` says, section by section."""

    problems: Mapping[str, Any]
    text: Mapping[str, Any]
    sft: Mapping[str, Any]
    tuning: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    seeds: Mapping[str, Sequence[int]]
    pairs: Mapping[str, Pair]
    arms: Mapping[str, Arm]
    criteria: Mapping[str, Any]
    content: Mapping[str, Any]
    """All of it as plain values: what must not change between calls."""

    @property
    def digest(self) -> str:
        """Hash of the content without titles."""
        text = json.dumps(_untitled(self.content), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def owner(self, pair: str, arm: str) -> str:
        """The pair that an arm is run for: pairs of one student share what needs no teacher."""
        if self.arms[arm].needs_teacher:
            return pair
        student = self.pairs[pair].student
        return next(name for name, each in self.pairs.items() if each.student == student)

    def unit(self, pair: str, arm: str, seed: int) -> Unit:
        """The unit of an arm. The base student is the same for all seeds."""
        is_base = self.arms[arm].mode == "none"
        return Unit(self.owner(pair, arm), arm, 0 if is_base else seed)

    def units(
        self, profile: str, arms: Sequence[str] = (), seeds: Sequence[int] = ()
    ) -> list[Unit]:
        """Units of a profile, or of some arms and seeds, the seeds of the main profile first."""
        chosen = [self.arm(name) for name in arms] or [
            each for each in self.arms.values() if profile == "full" or each.group == "main"
        ]
        found: dict[Unit, int] = {}
        for arm in chosen:
            for seed in seeds or self._seeds(profile, arm):
                late = 2 * (arm.group != "main") + (seed not in self.seeds["main"])
                for pair in self.pairs if arm.group == "main" or arms else [*self.pairs][:1]:
                    found.setdefault(self.unit(pair, arm.name, seed), late)
        return sorted(found, key=lambda unit: (found[unit], unit.seed))

    def _seeds(self, profile: str, arm: Arm) -> Sequence[int]:
        return self.seeds[profile if arm.group == "main" else "extra"]

    def arm(self, name: str) -> Arm:
        """An arm by name. Raises ConfigError."""
        if name not in self.arms:
            raise ConfigError(
                f"there is no arm {name!r}{did_you_mean(name, self.arms)}; the arms are: "
                f"{', '.join(self.arms)}"
            )
        return self.arms[name]


def load_plan(path: Path = DEFAULT_PLAN) -> Plan:
    """The plan of a YAML file. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the plan {path}: {error}") from error
    return _plan_of(content, f"plan {path}")


def plan_of_folder(output: Path) -> tuple[Plan, str | None]:
    """The plan and the dataset that a folder of results was begun with. Raises RunFolderError."""
    path = output / "plan.json"
    if not path.exists():
        raise RunFolderError(f"{output} holds no results: it has no plan.json; call `run` first")
    found = read_json(path)
    return _plan_of(found["plan"], str(path)), found["dataset"]


def _plan_of(content: Any, where: str) -> Plan:
    content = _mapping(content, where)
    arms = {
        name: _built(Arm, {"name": name, **_mapping(values, f"arm {name}")}, f"arm {name}")
        for name, values in _mapping(content.get("arms", {}), f"{where}, arms").items()
    }
    pairs = {
        name: _built(Pair, {"name": name, **_mapping(values, f"pair {name}")}, f"pair {name}")
        for name, values in _mapping(content.get("pairs", {}), f"{where}, pairs").items()
    }
    # the same content as read again from a folder of results, whose keys are texts
    plain = json.loads(json.dumps(content))
    plan = _built(Plan, {**content, "arms": arms, "pairs": pairs, "content": plain}, where)
    shipped = yaml.safe_load(DEFAULT_PLAN.read_text("utf-8"))
    for name in _SECTIONS:
        _check_like(content[name], shipped[name], f"{where}, {name}")
    _check(plan)
    return plan


def _check(plan: Plan) -> None:
    for arm in plan.arms.values():
        if arm.sharpness and arm.sharpness not in SHARPNESS:
            raise ConfigError(
                f"arm {arm.name}: sharpness must be one of {', '.join(SHARPNESS)}, "
                f"got {arm.sharpness!r}"
            )
        if arm.recipe not in (None, *RECIPES):
            raise ConfigError(f"arm {arm.name}: no recipe {arm.recipe!r}; {', '.join(RECIPES)}")
        _check_count(arm.tries, f"arm {arm.name}: tries")
        _check_count(arm.rounds, f"arm {arm.name}: rounds")
        _built(MixtureConfig, arm.mixture_options, f"arm {arm.name}, mixture")
        _built(PromptConfig, arm.prompt, f"arm {arm.name}, prompt")
    if plan.text["grader"] not in ("math", "synthetic"):
        raise ConfigError(f"text.grader must be math or synthetic, got {plan.text['grader']!r}")
    for name in ("samples", "base_samples", "diversity_samples"):
        _check_count(plan.evaluation[name], f"evaluation.{name}")
    criteria = plan.criteria
    if criteria["metric"] not in METRICS:
        raise ConfigError(f"criteria.metric must be one of {', '.join(METRICS)}")
    for name in criteria["candidates"]:
        if plan.arm(name).sharpness not in criteria["teacher"]:
            raise ConfigError(
                f"criteria.teacher names no arm for the candidate {name}, which is drawn at "
                f"{plan.arm(name).sharpness!r}"
            )
    named = [criteria["default"], *criteria["teacher"].values(), *criteria["candidates"]]
    for name in [*named, *plan.tuning["arms"]]:
        plan.arm(name)


def _built(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    """An instance from a mapping. Raises ConfigError for a name too many or too few."""
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown name {name!r}{did_you_mean(name, known)}")
    needed = [
        name
        for name, each in known.items()
        if each.default is MISSING and each.default_factory is MISSING
    ]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"{where}: {', '.join(missing)} is missing")
    if not issubclass(kind, Checked):
        hints = get_type_hints(kind)
        for name, value in values.items():
            if not _fits(value, hints[name]):
                wanted = str(hints[name]).removeprefix("typing.")
                raise ConfigError(f"{where}: {name} must be {wanted}, got {value!r}")
    return kind(**values)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type, as far as the classes of this file need it."""
    kind = get_origin(hint) or hint
    if kind is Literal:
        return value in get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, as in {DEFAULT_PLAN.name}; got {value!r}")
    return value


def _check_count(value: int, where: str) -> None:
    """Results keep counts as one character each."""
    if not 1 <= value <= MOST_COUNTED:
        raise ConfigError(f"{where} must lie in [1, {MOST_COUNTED}], got {value}")


def _check_like(found: object, shipped: object, where: str) -> None:
    """ConfigError where a section has other names or other types than that of the shipped plan."""
    if isinstance(shipped, Mapping):
        values = _mapping(found, where)
        if where.endswith("criteria.teacher"):
            return  # by sharpness, of which a plan need not have all
        for name in values:
            if name not in shipped:
                raise ConfigError(f"{where}: unknown name {name!r}{did_you_mean(name, shipped)}")
        for name, each in shipped.items():
            if name not in values and name not in _OPTIONAL:
                raise ConfigError(f"{where}: {name} is missing")
            if values.get(name) is not None or name not in _OPTIONAL:
                _check_like(values[name], each, f"{where}.{name}")
        return
    kind = type(shipped)
    if not _fits(found, kind):
        # YAML takes 1e-3 for a text
        wanted = {int: "a whole number", float: "a number, such as 0.5 or 1.0e-3"}
        raise ConfigError(
            f"{where} must be {wanted.get(kind, f'a {kind.__name__}')}, got {found!r}"
        )


def given_pair(plan: Plan, teacher: str, student: str) -> Plan:
    """The plan with one pair, given by hub ids or folders, in place of its own."""
    pair = Pair("given", f"teacher {teacher}, student {student}", teacher, student)
    plain = {"given": {"title": pair.title, "teacher": teacher, "student": student}}
    return replace(plan, pairs={"given": pair}, content={**plan.content, "pairs": plain})


def claim_folder(output: Path, plan: Plan, dataset: str | None) -> None:
    """Write `plan.json` into a new folder of results.

    Raises RunFolderError where the folder was begun with another plan or dataset. Titles may
    change.
    """
    path = output / "plan.json"
    if not path.exists():
        text = json.dumps({"plan": dict(plan.content), "dataset": dataset}, indent=2)
        write_atomically(path, text + "\n")
        return
    before = read_json(path)
    differing = _differences("dataset", before["dataset"], dataset)
    differing += _differences("", _untitled(before["plan"]), _untitled(plan.content))
    if differing:
        raise RunFolderError(
            f"{output} was begun with another plan: {'; '.join(differing)}. Give the changed plan "
            "another --output, or restore the plan"
        )


def _untitled(content: Any) -> Any:
    """The content without titles."""
    if not isinstance(content, Mapping):
        return content
    return {name: _untitled(each) for name, each in content.items() if name != "title"}


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """Where two plans differ, as `a.b was x, is y`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        inside = [
            _differences(f"{name}.{key}".lstrip("."), before.get(key), now.get(key))
            for key in dict.fromkeys([*before, *now])
        ]
        return [line for lines in inside for line in lines]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]
