"""Lists of stages: the built-in recipes, and YAML files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from optimal_sampling.config import MixtureConfig, Stage, expand_user
from optimal_sampling.errors import ConfigError, did_you_mean

__all__ = ["RECIPES", "Recipe", "escalate", "read_stages", "recipe_stages"]

Recipe = Literal["escalate", "escalate_privileged"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)

_OWN_TRIES = 4
_MERGE_TAG = "tag:yaml.org,2002:merge"  # the key `<<`, of an alias whose keys are taken over
_OWN = [field.name for field in fields(Stage) if field.name != "mixture"]
_MIXTURE = [field.name for field in fields(MixtureConfig)]


def escalate(
    mixture: MixtureConfig | None = None,
    own_tries: int | None = None,
    *,
    privileged: bool = False,
) -> tuple[Stage, ...]:
    """The student's own tries (4), then the veto, then the teacher's likeliest text.

    `mixture`: what holds in all stages, such as the temperature. `privileged`: the teacher of the
    last stage is shown the right solution. Raises ConfigError for another alpha method.
    """
    mixture = mixture or MixtureConfig()
    if mixture.alpha_method not in (MixtureConfig.alpha_method, "veto"):
        raise ConfigError(
            f"alpha_method {mixture.alpha_method}: the recipe has a stage `veto` in its place; for "
            "another method write the stages into a file (--stages)"
        )
    tries = _OWN_TRIES if own_tries is None else own_tries
    hint: Literal["right"] | None = "right" if privileged else None
    return (
        Stage("own", mode="student", tries=tries, mixture=mixture),
        Stage("veto", mixture=replace(mixture, alpha_method="veto")),
        Stage("teacher", mode="teacher", hint=hint, mixture=replace(mixture, top_k=1)),
    )


def recipe_stages(
    recipe: Recipe, mixture: MixtureConfig, own_tries: int | None
) -> tuple[Stage, ...]:
    """The stages of a built-in recipe."""
    return escalate(mixture, own_tries, privileged=recipe == "escalate_privileged")


def read_stages(path: str | Path, mixture: MixtureConfig) -> tuple[Stage, ...]:
    """The stages of a YAML file: a list, each with a name and what differs from `mixture`.

    Raises ConfigError, which names the file and the stage.
    """
    document = _read_yaml(expand_user(path))
    if not isinstance(document, list) or not document:
        raise ConfigError(
            f"{path} must hold a list of stages, each with a name: `- name: own`, and below it "
            "`mode: student` and other options"
        )
    return tuple(_stage(path, number, each, mixture) for number, each in enumerate(document, 1))


def _stage(path: str | Path, number: int, given: object, mixture: MixtureConfig) -> Stage:
    if not isinstance(given, dict) or "name" not in given:
        raise ConfigError(f"{path}: stage {number} has no name, got {given!r}; add `name: ...`")
    place = f"{path}: stage {given['name']!r}"
    options = {str(name).replace("-", "_"): value for name, value in given.items()}
    for name in _repeated([str(name).replace("-", "_") for name in given]):
        raise ConfigError(f"{place}: {name} is given twice, with `-` and with `_`")
    for name in options:
        if name not in (*_OWN, *_MIXTURE):
            near = did_you_mean(name, (*_OWN, *_MIXTURE))
            raise ConfigError(
                f"{place}: unknown option {name!r}{near}; a stage has {', '.join(_OWN)}, and the "
                "options of the mixture, of which --help has a list"
            )
    own = {name: value for name, value in options.items() if name in _OWN}
    others = {name: value for name, value in options.items() if name in _MIXTURE}
    try:
        return Stage(**own, mixture=replace(mixture, **others))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            given = [key for key, _ in node.value if key.tag != _MERGE_TAG]
            keys = [self.construct_object(key, deep=True) for key in given]
            for key in _repeated(keys):
                raise ConfigError(f"{path}: {key!r} is given twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text("utf-8"), Loader=Loader)
    except OSError as error:
        raise ConfigError(f"cannot read --stages {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--stages {path} is not YAML: {error}") from error


def _repeated(keys: list[Any]) -> Iterator[Any]:
    return (key for place, key in enumerate(keys) if key in keys[:place])
