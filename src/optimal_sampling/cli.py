"""The command `optimal-sampling`: its subcommands, their options, exit codes and signals.

Flags are derived from the config classes. `--help` imports nothing heavy.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from optimal_sampling.config import (
    ENGINES,
    Checked,
    EngineOptions,
    GenerateConfig,
    RunConfig,
    Stage,
    VerifyOptions,
    VllmOptions,
    engine_options,
)
from optimal_sampling.errors import ConfigError, OptimalSamplingError, did_you_mean
from optimal_sampling.generate.recipes import Recipe, read_stages, recipe_stages
from optimal_sampling.interrupts import PROGRAM, signals_interrupt
from optimal_sampling.types import UNBOUNDED_METHODS
from optimal_sampling.version import __version__

__all__ = ["ALIASES", "EXIT_CODES", "main"]

ALIASES = {
    "model-theta": "student",
    "model-theta-path": "student",
    "model-t": "teacher",
    "model-t-path": "teacher",
    "model-teacher": "teacher",
    "max-tokens": "max-new-tokens",
    "target-top-k": "teacher-support-top-k",
    "target-top-p": "teacher-support-top-p",
}
"""Other spellings of options."""

_LISTS = ("vllm", "teacher-url", "student-url")
"""Options with a list of values, which may be given several times."""

NO_OPS = ("resume", "constraint-to-target")
"""Accepted flags that state the default: runs resume, and teacher-support options restrict."""

EXIT_CODES = """exit codes:
  0    everything asked for is there
  1    the disk or the engine failed; what was finished is safe
  2    an option, the config or the input has to change
  3    finished, but some prompts failed (a later call tries them again)
  130  interrupted; what was finished is safe"""

Options = TypeVar("Options")
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_UNSET = ("", "null", "~")

EXAMPLES = {
    "generate": f"""examples:
  {PROGRAM} generate --dataset synthetic --num-examples 20 --output-dir outputs/try
  {PROGRAM} generate --teacher Qwen/Qwen2.5-3B-Instruct --student Qwen/Qwen2.5-1.5B-Instruct \\
      --dataset prompts.jsonl --output-dir outputs/run --max-new-tokens 512 \\
      --teacher-template '{{problem}} Reference solution: {{solution}}'
  {PROGRAM} generate --config run.yaml --data-slice 0::8""",
    "evaluate": f"""examples:
  {PROGRAM} evaluate --extra-models toy-student toy-teacher --benchmarks synthetic \\
      --max-new-tokens 160 --output-dir outputs/scores
  {PROGRAM} evaluate --checkpoint-dir checkpoints --extra-models Qwen/Qwen3-1.7B \\
      --benchmarks math500 aime24 --samples 16 --pass-at 1 8 --output-dir outputs/scores""",
    "verify": f"""examples:
  {PROGRAM} verify outputs/run
  {PROGRAM} verify outputs/run --grader graders.py:check --reference solution --workers 8""",
    "status": f"""examples:
  {PROGRAM} status outputs/run
  {PROGRAM} status outputs/shard-*""",
    "merge": f"""examples:
  {PROGRAM} merge outputs/shard-0 outputs/shard-1 --output-dir outputs/run""",
    "report": f"""examples:
  {PROGRAM} report outputs/run
  {PROGRAM} report outputs/run outputs/baseline outputs/scores \\
      --output compare.html --samples 500""",
    "show": f"""examples:
  {PROGRAM} show outputs/run
  {PROGRAM} show outputs/run 17:1 --colour-by kl_student""",
    "export": f"""examples:
  {PROGRAM} export outputs/run --output-dir outputs/sft/os --only correct
  {PROGRAM} export outputs/teacher --kind baseline --max-per-prompt 1 --prefer shortest
  {PROGRAM} export outputs/run --decontaminate test.jsonl --validation-share 0.02""",
    "demo": f"""examples:
  {PROGRAM} demo
  {PROGRAM} demo --num-examples 50 --output-dir outputs/small""",
    "bench": f"""examples:
  {PROGRAM} bench speed --threads 1 --num-prompts 256
  {PROGRAM} bench identity --output identity.json""",
    "serve": f"""examples:
  {PROGRAM} serve --teacher Qwen/Qwen2.5-3B-Instruct --student Qwen/Qwen2.5-1.5B-Instruct
  {PROGRAM} serve --port 9000 --alpha-min 0.3 --draft-tokens 4""",
    "servers": f"""examples:
  {PROGRAM} servers --teacher Qwen/Qwen3-14B --student Qwen/Qwen3-4B-Base
  {PROGRAM} servers --start
  {PROGRAM} servers --fake""",
    "sft": f"""examples:
  {PROGRAM} sft --dataset_name outputs/export --output_dir outputs/sft --learning_rate 1e-3
  {PROGRAM} sft --model_name_or_path Qwen/Qwen3-1.7B --dataset_name outputs/export \\
      --output_dir checkpoints/q3-1.7b --fsdp full_shard --max_length 16384 \\
      --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --num_train_epochs 3
  {PROGRAM} sft --dataset_name outputs/export --use_peft --lora_r 32 --learning_rate 2e-4""",
}
"""Command lines at the end of each subcommand's `--help`."""


@dataclass(frozen=True)
class GenerateOptions(GenerateConfig):
    """Generate records of q* for the prompts of a dataset.

    A second call on the same --output-dir goes on where the first one ended.
    """

    engine_name: Annotated[str, tyro.conf.arg(name="engine")] = "local"
    """Where logits come from: `local` runs Transformers models in this process, `vllm` runs both in
    vLLM (the extra `vllm`), `servers` asks two servers for lists of likely tokens (the extra
    `servers`), `toy` is two tables, for tests. Each has its own options, shown by
    `--engine NAME --help`."""
    config: str | None = None
    """YAML file with options by name (`alpha_min: 0.3`); options on the command line win."""
    recipe: Recipe | None = None
    """Stages, each a pass over the prompts that have no correct completion yet (needs --verify):
    the student's own tries, then `veto`, then the teacher's likeliest text; `escalate_privileged`
    shows the right solution to the teacher of the last stage. The options of the mixture hold in
    all stages, but for what a stage is made of (docs/escalation.md)."""
    own_tries: int | None = None
    """Tries of the student alone in a recipe; unset: 4."""
    stages_file: Annotated[str | None, tyro.conf.arg(name="stages")] = None
    """YAML file with stages of your own (docs/escalation.md)."""
    stages: Annotated[tuple[Stage, ...], tyro.conf.Suppress] = ()
    dry_run: bool = False
    """Report on the whole dataset and stop: the first prompts as both models would see them, rows
    that would fail, lengths, notes, and an estimate of memory and time. Loads no weights."""

    def generate_config(self) -> GenerateConfig:
        """The options that are not about this command line."""
        given = {item.name: getattr(self, item.name) for item in fields(GenerateConfig)}
        return GenerateConfig(**given | {"stages": self._stages()})

    def _stages(self) -> tuple[Stage, ...]:
        """Those of a recipe or a file. Raises ConfigError."""
        if self.recipe and self.stages_file:
            raise ConfigError("--recipe and --stages are two lists of stages; give one of them")
        if self.own_tries is not None and not self.recipe:
            raise ConfigError("--own-tries belongs to --recipe; a file says `tries` in each stage")
        if self.recipe:
            return recipe_stages(self.recipe, self.mixture, self.own_tries)
        if self.stages_file:
            return read_stages(self.stages_file, self.mixture)
        return self.stages


@dataclass(frozen=True)
class VerifyCommand:
    """Grade the completions of run folders. Verdicts are written beside the records.

    A second call goes on where the first one ended.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders."""
    grading: VerifyOptions = field(default_factory=VerifyOptions)


@dataclass(frozen=True)
class StatusOptions:
    """What run folders hold: good, owed and failed samples, speed, means. Changes nothing."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders."""


@dataclass(frozen=True)
class MergeOptions:
    """Put the run folders of finished shards together in a new one.

    All must have the same options, and their data slices must cover the dataset once.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders, one per data slice."""
    output_dir: str = "outputs/merged"
    """The new run folder."""


def run_generate(arguments: Sequence[str]) -> int:
    """The subcommand `generate`."""
    options = parse_generate(arguments)
    config = options.generate_config()
    if options.dry_run:
        return _dry_run(config)
    return _run_interruptible(lambda: _generate(config))


def _generate(config: GenerateConfig) -> int:
    from rich.console import Console

    from optimal_sampling.generate import generate
    from optimal_sampling.generate.progress import progress_for

    summary = generate(config, progress_for())
    Console().print(summary.table())
    return 3 if summary.failed or summary.not_graded else 0


def run_evaluate(arguments: Sequence[str]) -> int:
    """The subcommand `evaluate`."""
    from rich.console import Console

    from optimal_sampling.evaluate import EvaluateConfig, evaluate
    from optimal_sampling.evaluate.tables import markdown_text, rich_table
    from optimal_sampling.generate.progress import progress_for

    config = _parse("evaluate", EvaluateConfig(), arguments)
    try:
        report = evaluate(config, progress_for, lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        _say_interrupted(f"what was finished is safe in {config.output_dir}")
        return 130
    if sys.stdout.isatty():
        Console().print(rich_table(report.summary))
    else:
        print(markdown_text(report.summary))  # a terminal's table is cut to a width
    for line in report.missing:
        print(f"{PROGRAM}: without a whole score: {line}", file=sys.stderr)
    print(" ".join(map(str, report.files)))
    return 3 if report.missing else 0


def run_verify(arguments: Sequence[str]) -> int:
    """The subcommand `verify`."""
    from optimal_sampling.verify.job import Interrupted, verify
    from optimal_sampling.verify.progress import progress_for

    command = _parse("verify", VerifyCommand(), arguments)
    if not command.runs:
        raise ConfigError(f"name the run folders: {PROGRAM} verify outputs/run")
    try:
        tally = verify(
            [_checked_path(run) for run in command.runs], command.grading, progress_for()
        )
    except Interrupted as interrupt:
        _say_interrupted(f"{interrupt.tally.new} new verdicts are safe")
        return 130
    for line in tally.lines():
        print(line)
    return 3 if tally.failures else 0


def run_status(arguments: Sequence[str]) -> int:
    """The subcommand `status`."""
    from rich.console import Console

    from optimal_sampling.generate import folder_status

    runs = _parse("status", StatusOptions(), arguments).runs
    if not runs:
        raise ConfigError(f"name the run folders: {PROGRAM} status outputs/run")
    for run in runs:
        Console().print(folder_status(_checked_path(run)))
    return 0


def run_report(arguments: Sequence[str]) -> int:
    """The subcommand `report`."""
    from optimal_sampling.report import ReportOptions
    from optimal_sampling.report.page import write_report
    from optimal_sampling.report.plot import needs_matplotlib

    options = _parse("report", ReportOptions(), arguments)
    if options.figures is not None:
        needs_matplotlib("--figures")
    page = write_report(options, lambda line: print(line, file=sys.stderr, flush=True))
    for line in page.lines():
        print(line)
    if options.figures is not None:
        _write_figures(options.runs, options.figures)
    return 0


def _write_figures(runs: Sequence[str], folder: str) -> None:
    from optimal_sampling.report.figures import write_figures

    paths = [Path(_checked_path(run)) for run in runs]
    files = write_figures(
        paths, Path(_checked_path(folder)), note=lambda line: print(line, file=sys.stderr)
    )
    print(" ".join(map(str, files)))


def run_show(arguments: Sequence[str]) -> int:
    """The subcommand `show`."""
    from rich.console import Console

    from optimal_sampling.report import ShowOptions
    from optimal_sampling.report.show import show

    Console().print(show(_parse("show", ShowOptions(), arguments)), soft_wrap=False)
    return 0


def run_merge(arguments: Sequence[str]) -> int:
    """The subcommand `merge`."""
    from optimal_sampling.records import end_of_shards, merge

    options = _parse("merge", MergeOptions(), arguments)
    target = _checked_path(options.output_dir)
    shards = [_checked_path(run) for run in options.runs]
    count = merge(shards, target)
    print(f"{count} records in {target}")
    if (end := end_of_shards(shards)) is not None:
        print(f"the slices end there: rows from {end} on, if the dataset has any, are in none")
    return 0


def _checked_path(text: str) -> str:
    """`~` expanded. Raises ConfigError for what is no path."""
    return RunConfig(output_dir=text).output_dir


def run_export(arguments: Sequence[str]) -> int:
    """The subcommand `export`."""
    from rich.console import Console

    from optimal_sampling.export_tools import print_report, tools
    from optimal_sampling.records.export import ExportOptions, export, push

    options = _parse("export", ExportOptions(), arguments)
    try:
        report = export(options, tools(), [typed_command(sys.orig_argv)])
    except KeyboardInterrupt:
        _say_interrupted(f"{options.output_dir} is as it was")
        return 130
    print_report(report, Console())
    if options.push_to_hub is not None:
        print(push(report.folder, options.push_to_hub, private=options.hub_private))
    return 0


def run_demo(arguments: Sequence[str]) -> int:
    """The subcommand `demo`."""
    from rich.console import Console

    from optimal_sampling.demo import DemoOptions, run_demo
    from optimal_sampling.generate.progress import progress_for

    options = _parse("demo", DemoOptions(), arguments)
    return _run_interruptible(lambda: run_demo(options, progress_for(), Console()))


def run_bench(arguments: Sequence[str]) -> int:
    """The subcommand `bench`."""
    from rich.console import Console

    from optimal_sampling.bench import parse_bench, run_bench

    try:
        return run_bench(parse_bench(arguments, f"{PROGRAM} bench"), Console())
    except KeyboardInterrupt:
        _say_interrupted("nothing is kept of a measurement in progress", advice="To begin again")
        return 130


def run_serve(arguments: Sequence[str]) -> int:
    """The subcommand `serve`."""
    from optimal_sampling.serve import ServeConfig, serve

    args = _unalias(arguments)
    _check_engine_options(args, VllmOptions)
    _check_bounds(args)
    serve(_parse("serve", ServeConfig(), args))
    return 0


def run_servers(arguments: Sequence[str]) -> int:
    """The subcommand `servers`."""
    from optimal_sampling.engines.servers.launch import ServersCommand, run_servers

    command = _parse("servers", ServersCommand(), arguments)
    try:
        run_servers(
            command,
            lambda text: print(text, flush=True),
            lambda text: print(text, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted; no server is left", file=sys.stderr)
        return 130
    return 0


def run_sft(arguments: Sequence[str]) -> int:
    """The subcommand `sft`."""
    from rich.console import Console

    from optimal_sampling.train import launch, parse_sft

    options, trl = parse_sft(arguments, f"{PROGRAM} sft")
    command = launch.launch_command(options, arguments)
    if command:
        print(f"starting: {launch.printable(command)}", file=sys.stderr, flush=True)
        os.execv(command[0], command)
    from optimal_sampling.train.sft import sft

    safe = f"what {options.output_dir} holds is safe"
    try:
        with launch.quiet_but_for_the_main_process():
            summary = sft(options, trl)
    except KeyboardInterrupt:  # while it reads, checks, or saves the model
        is_interrupted = True
    else:
        is_interrupted = summary.status == "interrupted"
        safe = f"{summary.checkpoint} is safe"
        if launch.is_main_process():
            Console().print(summary.table())
    if is_interrupted and launch.is_main_process():
        _say_interrupted(safe, launch.typed_again(arguments))
    return 130 if is_interrupted else 0


def _run_interruptible(job: Callable[[], int]) -> int:
    """Exit code of a job. Ctrl-C prints what is safe and how to go on."""
    from optimal_sampling.generate import Interrupted

    try:
        return job()
    except Interrupted as interrupt:
        summary = interrupt.summary
        _say_interrupted(f"{summary.folder_records} good records are safe in {summary.run_folder}")
        return 130


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "generate": ("generate records of q* for the prompts of a dataset", run_generate),
    "evaluate": ("scores of checkpoints on benchmarks of mathematics", run_evaluate),
    "verify": ("grade the completions of run folders: are the answers right?", run_verify),
    "status": ("what run folders hold: good, owed, failed, speed, means", run_status),
    "report": ("run folders and scores -> one HTML page to look at", run_report),
    "show": ("one sample of a run folder, its tokens coloured", run_show),
    "merge": ("the run folders of several shards -> one", run_merge),
    "export": ("run folders -> a training set for load_dataset and trl sft", run_export),
    "demo": (
        "q* beside student and teacher alone, with the shipped pair of small models",
        run_demo,
    ),
    "bench": ("speed and memory on this machine, beside Transformers", run_bench),
    "sft": ("train the student on an exported dataset, with TRL", run_sft),
    "serve": ("an OpenAI-compatible server of q* (needs the extra `vllm`)", run_serve),
    "servers": ("servers of teacher and student for --engine servers", run_servers),
}
"""Subcommands: a line of help, and what runs them, which imports what it needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code. An OptimalSamplingError is printed without a traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):  # a lone surrogate in a prompt must not end a run
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with signals_interrupt(_ended_at_once):
            return _dispatch(arguments)
    except OptimalSamplingError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        _say_interrupted("nothing had been started")
        return 130
    except BrokenPipeError:  # `| head` went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a path that cannot be read, or is too long; it names the path
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1


def _dispatch(arguments: Sequence[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; see {PROGRAM} --help"
        )
    try:
        return COMMANDS[name][1](arguments[1:])
    except SystemExit:
        if {"-h", "--help"} & {*arguments}:
            print(EXAMPLES[name])
        raise


def _help() -> str:
    commands = "\n".join(f"  {name:12}{text}" for name, (text, _) in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND [OPTIONS]\n\n"
        "Distillation data drawn token by token from the geometric mixture of a teacher and a "
        f"student.\n\ncommands:\n{commands}\n\n"
        f"{PROGRAM} COMMAND --help lists a command's options; --version the version.\n\n"
        f"{EXIT_CODES}"
    )


def parse_generate(arguments: Sequence[str]) -> GenerateOptions:
    """Options from the command line and, where `--config` names one, from a YAML file."""
    path = _value_of("config", arguments)
    from_file = _yaml_arguments(Path(_checked_path(path))) if path is not None else []
    args = _unalias([*from_file, *arguments])
    engine = engine_options(_value_of("engine", args) or GenerateConfig().engine.name)
    _check_engine_options(args, engine)
    _check_bounds(args)
    default = GenerateOptions(engine=engine())
    return _parse("generate", default, args, _generate_description())


def _parse(
    command: str,
    default: Options,
    arguments: Sequence[str],
    description: str | None = None,
) -> Options:
    """A subcommand's options, over their defaults. A bad one, and `--help`, end the process."""
    return tyro.cli(
        type(default),
        default=default,
        prog=f"{PROGRAM} {command}",
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        description=description,
    )


def _check_engine_options(arguments: Sequence[str], engine: type[EngineOptions]) -> None:
    """Refuse options that other engines have and this one has not."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        having = [each.name for each in ENGINES.values() if name in _names(each)]
        if flag.startswith("--") and having and engine.name not in having:
            raise ConfigError(
                f"{flag} is an option of the engine {' and '.join(having)}, "
                f"and the engine {engine.name} has no such option"
            )


def _check_bounds(arguments: Sequence[str]) -> None:
    """Refuse bounds of alpha beside a method without bounds, also those that are the defaults."""
    method = _value_of("alpha-method", arguments)
    for argument in arguments:
        flag = argument.partition("=")[0]
        if method in UNBOUNDED_METHODS and flag in ("--alpha-min", "--alpha-max"):
            raise ConfigError(
                f"{flag} does nothing with --alpha-method {method}, which has no bounds; "
                "leave it out"
            )


def _names(options: type[EngineOptions]) -> set[str]:
    return {item.name for item in fields(options)}


def _generate_description() -> str:
    aliases = ", ".join(f"--{alias} = --{name}" for alias, name in ALIASES.items())
    without_effect = ", ".join(f"--{name}" for name in NO_OPS)
    return (
        f"{inspect.getdoc(GenerateOptions)}\n\nUnderscores and hyphens are the same. "
        f"Also accepted: {aliases}; without effect: {without_effect}.\n\n{EXIT_CODES}"
    )


def _unalias(arguments: Sequence[str]) -> list[str]:
    """The same arguments, with the options under their own names."""
    result = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        if not argument.startswith("--") or not name:
            result.append(argument)
        elif name not in NO_OPS:
            result.append(f"--{ALIASES.get(name, name)}{equals}{value}")
    _check_constraint(arguments, result)
    for name in _LISTS:
        result = _joined(result, name)
    return result


def _joined(arguments: Sequence[str], name: str) -> list[str]:
    """The same arguments, with the values of every occurrence of a list option after one flag."""
    rest: list[str] = []
    values: list[str] = []
    target = rest
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag == f"--{name}":
            target = values
            values += [value] if equals else []
        else:
            target = rest if argument.startswith("-") else target
            target.append(argument)
    return [*rest, f"--{name}", *values] if values else rest


def _check_constraint(arguments: Sequence[str], result: Sequence[str]) -> None:
    asked = any(
        argument.replace("_", "-").startswith("--constraint-to-target") for argument in arguments
    )
    if asked and not any(argument.startswith("--teacher-support") for argument in result):
        raise ConfigError(
            "--constraint-to-target needs --target-top-k or --target-top-p: what to restrict to"
        )


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", dest="value")
    known, _ = parser.parse_known_args(arguments)
    return str(known.value) if known.value is not None else None


def _yaml_arguments(path: Path) -> list[str]:
    """Options of a YAML file as command-line arguments: one parser, and one set of messages.

    Values are text as written: YAML itself would read 10:20 as a number and a bare `on` as true.
    """
    types = _option_types()
    arguments = []
    for key, value in _read_yaml(path).items():
        name = str(key).replace("_", "-")
        name = ALIASES.get(name, name)
        if name not in types:
            raise ConfigError(f"{path}: unknown option {key!r}{did_you_mean(name, types)}")
        if types[name].startswith("tuple") and isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
            continue
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {key} must be a single value, got {value!r}")
        if value.lower() in _UNSET:
            continue
        if types[name] != "bool":
            arguments.append(f"--{name}={value}")
        elif value.lower() not in _TRUTH:
            raise ConfigError(f"{path}: {name} must be true or false, got {value!r}")
        elif _TRUTH[value.lower()]:
            arguments.append(f"--{name}")
        elif name not in NO_OPS:
            arguments.append(f"--no-{name}")
    return arguments


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        # The base loader leaves values as text and constructs nothing.
        document = yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path} must hold options by name, such as `alpha_min: 0.3`")
    return document


def _option_types() -> dict[str, Any]:
    """Flags of `generate` as they are typed, with the annotations of their fields."""
    config = GenerateConfig()
    values = (getattr(config, item.name) for item in fields(config))
    sections = [type(value) for value in values if isinstance(value, Checked)]
    types: dict[str, Any] = dict.fromkeys(("engine", "recipe", "own-tries", "stages"), "str")
    types |= dict.fromkeys(NO_OPS, "bool")
    for section in (*sections, *ENGINES.values()):
        types |= {item.name.replace("_", "-"): item.type for item in fields(section)}
    return types


def _dry_run(config: GenerateConfig) -> int:
    from optimal_sampling.generate import dry_run

    for line in dry_run(config).lines():
        print(line)
    print("=== dry run: nothing was generated")
    return 0


def _interrupted(state: str, command: str = "", advice: str = "To go on") -> str:
    """What is said of an interrupted command: what is safe, and how to go on."""
    command = command or typed_command(sys.orig_argv)
    return f"\n{PROGRAM}: interrupted; {state}. {advice}:\n  {command}\n"


def _ended_at_once() -> str:
    return _interrupted("ended at once, and what was on the disk is safe")


def _say_interrupted(state: str, command: str = "", advice: str = "To go on") -> None:
    print(_interrupted(state, command, advice), end="", file=sys.stderr)


def typed_command(words: Sequence[str]) -> str:
    """The command line that started this process, from `sys.orig_argv`, for a shell.

    An installed command is run as `python /path/to/optimal-sampling`, and is shown as itself.
    """
    names = [Path(word).name for word in words[:3]]
    if PROGRAM not in names:
        return shlex.join(words)
    place = names.index(PROGRAM)
    program = PROGRAM if shutil.which(PROGRAM) == words[place] else words[place]
    return shlex.join([program, *words[place + 1 :]])
