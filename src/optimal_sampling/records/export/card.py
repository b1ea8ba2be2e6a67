"""The export's README.md: how to load and train, and everything that is known of the data."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from optimal_sampling import toy_pair
from optimal_sampling.config import ENGINES, GenerateConfig
from optimal_sampling.records.export.options import ExportOptions
from optimal_sampling.records.export.reading import Run
from optimal_sampling.records.export.tokens import StudentTokens
from optimal_sampling.records.run_folder import flat, stage_text
from optimal_sampling.types import UNBOUNDED_METHODS
from optimal_sampling.version import __version__

__all__ = ["Section", "card", "generate_command", "made_with", "train_command"]

Section = tuple[str, list[tuple[str, str]]]
"""A title, and names with their values."""

_KINDS = {
    "optimal_sampling": "Completions drawn token by token from a mixture q of a student and a "
    "teacher: q ∝ p_student^(1−alpha) · p_teacher^alpha, or what the alpha method below means.",
    "baseline": "Completions drawn from the teacher alone.",
    "student": "Completions drawn from the student alone.",
    "warmstart": "The reference solutions of the source dataset.",
}
_FORMATS = {
    "text": "`prompt` and `completion`; loss falls on the completion only.",
    "tokens": "`input_ids` and `labels`; the ids are those that were drawn, labels of the prompt "
    "are -100.",
    "prompts": "`prompt` for trainers that draw their own completions, and `privileged_context`, "
    "where there is one, for the teacher only (SDFT). No completions.",
}


def train_command(options: ExportOptions, tokens: StudentTokens, longest: int) -> str | None:
    """TRL's command line that trains on the folder; None where rows have no completions."""
    if options.format == "prompts":
        return None
    words = ["trl", "sft", "--model_name_or_path", _path(tokens.model)]
    words += ["--dataset_name", options.push_to_hub or str(options.output_dir)]
    words += ["--max_length", str(longest)]
    if tokens.eos_option is not None:
        words += ["--eos_token", tokens.eos_option]
    return shlex.join([*words, "--output_dir", "checkpoints/sft"])


def generate_command(run: Run) -> str:
    """A command line that makes such a run: its options, where they are not the defaults."""
    given = {**run.may_differ, **run.compared}
    engine = str(given.get("engine", "local"))
    defaults = flat(GenerateConfig(engine=ENGINES[engine]())) if engine in ENGINES else {}
    words = ["optimal-sampling", "generate"]
    for name, value in given.items():
        if name == "stages":
            words += ["--stages=stages.yaml"] if value else []
        elif name in defaults and value is not None and value != defaults[name]:
            words += _flag(name.replace("_", "-"), value)
    if engine != "local":
        words += ["--engine", engine]
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}={value}"]


def _path(model: str) -> str:
    """A name that Transformers knows."""
    return str(toy_pair.path(model)) if model in toy_pair.NAMES else model


def card(
    options: ExportOptions,
    runs: list[Run],
    sections: Iterable[Section],
    commands: Iterable[str],
    folder: Path,
) -> str:
    """README.md: YAML for the hub and `load_dataset`, then Markdown.

    `folder`: holds the rows, in `data/SPLIT-*.parquet`.
    """
    source = _first(runs, "dataset")
    parts = [
        _front_matter(options, folder, licence(options, source)),
        f"# {options.kind}: {source}\n",
        f"{_KINDS[options.kind]}{_in_stages(runs)}\nMade by optimal-sampling {__version__}.\n",
        f"Columns: {_FORMATS[options.format]}",
        "`id` and `sample_index` are those of the records.\n"
        if options.format != "prompts"
        else "",
    ]
    parts += [_table(title, lines) for title, lines in sections]
    # Fenced: an indented block would end, or change an option, where one holds a line break.
    text = "\n".join(commands)
    parts.append(f"## Commands\n\n~~~sh\n{text}\n~~~\n")
    return "\n".join(parts)


def licence(options: ExportOptions, source: str) -> str:
    """Licence of the source dataset: as given, that of its README.md, or `unknown`."""
    if options.licence is not None:
        return options.licence
    if source == "synthetic":
        return "apache-2.0"
    path = Path(source)
    for folder in (path, path.parent):
        if path.exists() and (readme := folder / "README.md").is_file():
            return _licence_of(readme.read_text("utf-8", errors="replace"))
    return "unknown"


def _licence_of(readme: str) -> str:
    if not readme.startswith("---"):
        return "unknown"
    head = readme.split("---")[1]
    lines = (line.partition(":") for line in head.splitlines())
    return next((value.strip() for name, _, value in lines if name == "license"), "unknown")


def _front_matter(options: ExportOptions, folder: Path, name: str) -> str:
    """The name of the config is that of its content, by which the cache of `datasets` knows it.

    That cache tells local folders apart by their last name and the config's alone, and would give
    the rows of another export, or those from before an overwrite.
    """
    import yaml

    paths = sorted(folder.glob("data/*.parquet"))
    splits = dict.fromkeys(path.name.split("-")[0] for path in paths)
    digest = blake2b(digest_size=6)
    for path in paths:
        digest.update(path.read_bytes())
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    head: Mapping[str, Any] = {
        "license": name,
        "task_categories": ["text-generation"],
        "tags": ["distillation", "optimal-sampling", options.kind],
        "configs": [{"config_name": f"{options.kind}-{digest.hexdigest()}", "data_files": files}],
    }
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False)}---\n"


def _in_stages(runs: list[Run]) -> str:
    """A sentence on the stages of the runs, where they have any."""
    names = dict.fromkeys(stage["name"] for run in runs for stage in run.stages)
    if not names:
        return ""
    return (
        f" In stages ({', '.join(names)}): each prompt has the first completion that was graded as "
        "correct; some stages draw from one model alone (see below)."
    )


def _table(title: str, lines: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in lines)
    return f"## {title}\n\n| | |\n|---|---|\n{rows}\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _first(runs: list[Run], name: str) -> str:
    return ", ".join(dict.fromkeys(str(run.compared.get(name)) for run in runs))


def _method_options(runs: list[Run]) -> dict[str, str]:
    """Titles and names of the options that belong to the alpha methods of the runs."""
    methods = {run.compared.get("alpha_method") for run in runs}
    names = [name for method in sorted(map(str, methods)) for name in _OPTIONS_OF.get(method, ())]
    if methods - {*UNBOUNDED_METHODS}:
        names += ["alpha_min", "alpha_max"]
    return {name.replace("_", " "): name for name in names}


_OPTIONS_OF = {
    "arithmetic": ("arithmetic_weight",),
    "interleaved": ("interleaved_top_k", "interleaved_min_p"),
    "veto": ("veto_min_p",),
}


def made_with(runs: list[Run]) -> list[tuple[str, str]]:
    """Models, dataset and method of the runs."""
    names = {
        "teacher": "teacher",
        "student": "student",
        "source dataset": "dataset",
        "drawn from": "mode",
        "alpha method": "alpha_method",
        **_method_options(runs),
        "teacher support by min-p": "teacher_support_min_p",
        "temperature": "temperature",
        "top-k of q (1: greedy)": "top_k",
        "top-p of q": "top_p",
        "teacher template": "teacher_template",
        "student template": "student_template",
        "thinking": "thinking",
        "most new tokens": "max_new_tokens",
        "engine": "engine",
    }
    stages = [
        (f"stage {number}", f"{stage['name']}: {stage_text(stage)}")
        for number, stage in enumerate(runs[0].stages, start=1)
    ]
    return [(title, _first(runs, name)) for title, name in names.items()] + stages
