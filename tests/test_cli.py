"""The command line: options, exit codes, and one message for each kind of bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

from optimal_sampling import toy_pair
from optimal_sampling.bench import parse_bench
from optimal_sampling.cli import (
    ALIASES,
    COMMANDS,
    EXAMPLES,
    EXIT_CODES,
    MergeOptions,
    StatusOptions,
    VerifyCommand,
    _parse,
    main,
    parse_generate,
    typed_command,
)
from optimal_sampling.config import ENGINES, GenerateConfig
from optimal_sampling.demo import DemoOptions
from optimal_sampling.engines.servers.launch import ServersCommand
from optimal_sampling.evaluate import EvaluateConfig
from optimal_sampling.records.export import ExportOptions
from optimal_sampling.records.store import Lock
from optimal_sampling.report import ReportOptions, ShowOptions
from optimal_sampling.serve import ServeConfig
from optimal_sampling.train import parse_sft


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def command(tmp_path, capsys):
    """Run a command line; its exit code, standard output and standard error. Fails on a
    traceback."""

    def run(*arguments):
        try:
            code = main(
                [
                    "generate",
                    "--output-dir",
                    str(tmp_path / "run"),
                    "--engine",
                    "toy",
                    *map(str, arguments),
                ]
            )
        except SystemExit as stop:  # the parser ends the process itself
            code = stop.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, " ".join(said.err.split())

    return run


@pytest.fixture
def rows(tmp_path):
    def write(*found):
        path = tmp_path / "rows.jsonl"
        path.write_text(
            "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in found)
        )
        return path

    return write


def parsed(*arguments):
    return parse_generate(arguments).generate_config()


def test_every_option_of_the_config_is_a_flag():
    """Guards: an option that can be set from Python only, or a default written twice."""
    assert parsed() == GenerateConfig()
    text = subprocess.run(
        [sys.executable, "-m", "optimal_sampling", "generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--engine " in text
    assert "--stages " in text
    for section in fields(GenerateConfig):
        if section.name == "stages":  # made of --stages or --recipe
            continue
        for option in fields(getattr(GenerateConfig(), section.name)):
            assert f"--{option.name.replace('_', '-')} " in text.replace(",", " ")
    for line in EXIT_CODES.splitlines():
        assert line in text


def test_other_spellings_are_understood():
    """Guards: command lines with other spellings of options, which existing scripts use."""
    config = parsed(
        *shlex.split(
            "--model_teacher Qwen/A --model_theta Qwen/B --dataset owner/name "
            "--batch_size 128 --max_tokens 16384 --output_dir ./outputs/x --resume "
            "--data_slice 0::8"
        )
    )
    assert (config.models.teacher, config.models.student) == ("Qwen/A", "Qwen/B")
    assert (config.engine.batch_size, config.run.max_new_tokens, config.data.data_slice) == (
        128,
        16384,
        "0::8",
    )
    config = parsed(
        *shlex.split(
            "--model_theta=Qwen/B --model_t Qwen/A --dataset synthetic --num_examples 1000 "
            "--alpha_method kl_symmetry --alpha_min 0.3 --alpha_max 1.0 --constraint_to_target "
            "--target_top_k 100 --target-top-p=0.95"
        )
    )
    assert (config.models.teacher, config.mixture.alpha_min, config.data.num_examples) == (
        "Qwen/A",
        0.3,
        1000,
    )
    assert (config.mixture.teacher_support_top_k, config.mixture.teacher_support_top_p) == (
        100,
        0.95,
    )
    assert parsed("--model_theta", "Qwen/B").models.teacher == GenerateConfig().models.teacher


def test_aliases_lead_to_options():
    """Guards: an alias of an option that was renamed."""
    for alias, name in ALIASES.items():
        assert alias != name
        parsed(f"--{alias}", "1")


def test_a_value_is_never_rewritten():
    """Guards: underscores of a value, or a value that looks like an alias, changed with the
    option's name."""
    config = parsed(
        "--student-system-prompt=--model_theta a_b", "--teacher_template", "{my_column} resume"
    )
    assert config.prompt.student_system_prompt == "--model_theta a_b"
    assert config.prompt.teacher_template == "{my_column} resume"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--chat-template", True), ("--no-chat-template", False), ("--no_chat_template", False)],
)
def test_switches(flag, value):
    """Guards: a switch that can be turned one way only."""
    assert parsed(flag).prompt.chat_template is value
    assert parsed("--force-first-token").mixture.force_first_token is True
    assert (
        parsed("--force-first-token", "--no-force-first-token").mixture.force_first_token is False
    )


def test_a_config_file(tmp_path):
    """Guards: a file that is read differently from the command line, or wins over it."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model_theta: Qwen/B\nalpha-min: 0.25\nmax_tokens: 7\nthinking: on\n"
        "chat_template: false\nresume: true\n"
        "num_examples:\nteacher_template: |-\n  {problem}\n  --hint: {answer}\n"
    )
    config = parsed("--config", str(path), "--max-new-tokens", "9")
    assert (config.models.student, config.mixture.alpha_min, config.run.max_new_tokens) == (
        "Qwen/B",
        0.25,
        9,
    )
    assert (config.prompt.thinking, config.prompt.chat_template) == ("on", False)
    assert config.prompt.teacher_template == "{problem}\n--hint: {answer}"
    assert config.data.num_examples is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha_mni: 0.3", "unknown option 'alpha_mni'; did you mean 'alpha-min'?"),
        ("dry_run: true", "unknown option 'dry_run'"),
        ("alpha_min: [0.3]", "alpha_min must be a single value"),
        ("alpha_min: low", "--alpha-min"),
        ("alpha_min: 2", "alpha_min must lie in [0, 1], got 2.0"),
        ("- alpha_min", "must hold options by name"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_config_file(command, tmp_path, text, message):
    """Guards: a misspelt key that is silently ignored."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, _, said = command("--config", path)
    assert code == 2
    assert message in said
    assert command("--config", tmp_path / "none.yaml")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha-mim", "0.3"], "--alpha-min"),
        (["--max-tokns", "3"], "Unrecognized options: --max-tokns"),
        (["--alpha-min", "1.5"], "alpha_min must lie in [0, 1], got 1.5"),
        (["--alpha-max", "nan"], "alpha_max must lie in [0, 1], got nan"),
        (
            ["--alpha-min", "0.9", "--alpha-max", "0.1"],
            "alpha_min (0.9) is larger than alpha_max (0.1)",
        ),
        (["--alpha-method", "magic"], "kl_symmetry"),
        (["--alpha-method", "veto", "--alpha-min", "0.5"], "--alpha-min does nothing with"),
        (["--alpha-method=arithmetic", "--alpha_max=0.9"], "--alpha-max does nothing with"),
        (["--alpha-method", "veto", "--veto-min-p", "0"], "veto_min_p must lie in (0, 1], got 0.0"),
        (["--temperature", "0"], "temperature must be larger than 0, got 0.0"),
        (["--top-p", "0"], "top_p must lie in (0, 1], got 0.0"),
        (["--top-p", "1.1"], "top_p must lie in (0, 1], got 1.1"),
        (["--top-k", "0"], "top_k must be -1 (off) or at least 1, got 0"),
        (["--data-slice", "1-8"], "data_slice must be START:STOP:STEP"),
        (["--batch-size", "2.5"], "--batch-size"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--constraint-to-target"], "needs --target-top-k or --target-top-p"),
        (["stray"], "stray"),
    ],
)
def test_bad_options(command, tmp_path, arguments, message):
    """Guards: a value that is accepted and fails an hour later, and a message without the option's
    name."""
    code, _, said = command(*arguments)
    assert code == 2
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "sdpa"], "--attention is an option of the engine local, and the engine"),
        (["--no-batch-invariant"], "--no-batch-invariant is an option of the engine local"),
        (["--batch-size=4"], "--batch-size is an option of the engine local and vllm"),
        (["--engine", "vlm"], "unknown engine 'vlm'; did you mean 'vllm'?"),
    ],
)
def test_options_of_another_engine_are_refused(command, arguments, message):
    """Guards: an option that the chosen engine ignores."""
    code, _, said = command(*arguments)
    assert code == 2
    assert message in said


def test_help_ends_with_examples(capsys, tmp_path, monkeypatch):
    """Guards: examples with options that do not exist, and a subcommand without any."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").touch()  # named by an example
    parsers = {
        "generate": parse_generate,
        "evaluate": partial(_parse, "evaluate", EvaluateConfig()),
        "verify": partial(_parse, "verify", VerifyCommand()),
        "status": partial(_parse, "status", StatusOptions()),
        "merge": partial(_parse, "merge", MergeOptions()),
        "export": partial(_parse, "export", ExportOptions()),
        "sft": partial(parse_sft, program="sft"),
        "demo": partial(_parse, "demo", DemoOptions()),
        "bench": partial(parse_bench, program="bench"),
        "serve": partial(_parse, "serve", ServeConfig()),
        "servers": partial(_parse, "servers", ServersCommand()),
        "report": partial(_parse, "report", ReportOptions()),
        "show": partial(_parse, "show", ShowOptions()),
    }
    assert EXAMPLES.keys() == parsers.keys() == COMMANDS.keys()
    for command, text in EXAMPLES.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        assert said.endswith(f"{text}\n")
        assert "options options" not in said
        _, *lines = text.replace("\\\n", "").splitlines()
        for line in lines:
            program, name, *arguments = shlex.split(line)
            assert (program, name) == ("optimal-sampling", command)
            parsers[command](arguments)


def test_help_shows_the_options_of_the_chosen_engine(capsys):
    """Guards: options in the help that the chosen engine refuses, and engines that nobody hears
    of."""
    for engine, options in ENGINES.items():
        with pytest.raises(SystemExit):
            main(["generate", "--engine", engine, "--help"])
        said = capsys.readouterr().out
        for other in ENGINES.values():
            for name in {f.name for f in fields(other)} - {f.name for f in fields(options)}:
                assert f"--{name.replace('_', '-')} " not in said
        assert all(f"`{name}`" in said for name in ENGINES)


def test_arguments_of_vllm_from_the_command_line_and_from_yaml(capsys, tmp_path):
    """Guards: all but the last --vllm lost, and a list in YAML refused."""
    typed = ["--engine", "vllm", "--vllm", "block_size=32", "--max-model-len=64", "--vllm=seed=5"]
    expected = {"block_size": 32, "seed": 5, "max_model_len": 64}
    assert parse_generate(typed).engine.settings == expected
    path = tmp_path / "run.yaml"
    path.write_text("engine: vllm\nmax_model_len: 64\nvllm: [block_size=32, seed=5]\n")
    assert parse_generate(["--config", str(path)]).engine.settings == expected
    for wrong in ("block_size", "=3", "max_model_len=9"):
        with pytest.raises(SystemExit, match="2"):
            parse_generate(["--engine", "vllm", "--max-model-len", "9", "--vllm", wrong])
        assert "vllm" in capsys.readouterr().err


def test_the_server_refuses_options_of_the_local_engine(capsys):
    """Guards: `serve --attention sdpa`, taken and ignored."""
    assert main(["serve", "--attention", "sdpa"]) == 2
    assert "--attention is an option of the engine local" in capsys.readouterr().err


def test_an_unknown_command(capsys):
    """Guards: a usage text of a page instead of the nearest command."""
    assert main(["genrate"]) == 2
    assert "did you mean 'generate'?" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0


def test_help_is_quick():
    """Guards: seconds of importing torch for a usage text."""
    code = (
        "import sys; from optimal_sampling.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'datasets'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_dry_run(command, rows, tmp_path):
    """Guards: a dry run that leaves something behind, or does not show what the teacher sees."""
    data = rows(
        {"question": r"\frac{1}{2}?", "answer": "0.5"}, {"question": None}, {"question": "\ud83d"}
    )
    code, out, _ = command(
        "--dataset", data, "--teacher-template", "{problem} Hint: {answer}", "--dry-run"
    )
    assert code == 0
    assert "=== row 0, student: " in out
    assert r"\frac{1}{2}? Hint: 0.5" in out
    assert "row 1: no prompt: column 'question' is null" in out
    assert not (tmp_path / "run").exists()


def test_a_run_and_its_resume(command, tmp_path):
    """The whole command with real tokenizers and the toy engine."""
    code, out, said = command("--num-examples", 3, "--max-new-tokens", 4)
    assert (code, "3 good of 3 asked (3 new)" in out) == (0, True)
    assert "3/3 done" in said
    code, out, _ = command("--num-examples", 4, "--max_tokens", 4, "--resume")
    assert (code, "4 good of 4 asked (1 new)" in out) == (0, True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["good"], summary["folder_records"]) == ("complete", 4, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (['{"problem": "1"}\n{"problem"; "2"}\n'], "is not JSON at line 2, column 11"),
        ([], "is empty"),
        ([{"text": "1", "label": 2}], "it has: text, label"),
    ],
)
def test_bad_datasets(command, rows, tmp_path, content, message):
    """Guards: a message that does not name the file, the line or the columns."""
    code, _, said = command("--dataset", rows(*content))
    assert code == 2
    assert "rows.jsonl" in said
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_missing_dataset(command, tmp_path):
    """Guards: a mistyped path that is looked up on the hub."""
    code, _, said = command("--dataset", tmp_path / "missing.jsonl")
    assert code == 2
    assert "missing.jsonl does not exist" in said


def test_bad_prompts_are_recorded_and_the_run_goes_on(command, rows, tmp_path):
    """Guards: a null, empty or overlong prompt that ends the run, is cut, or is reported as
    success."""
    data = rows(
        {"problem": "1+1=?"},
        {"problem": None},
        {"problem": ""},
        {"problem": "9" * 5000},
        {"problem": "2+2=?"},
    )
    code, out, _ = command("--dataset", data, "--max-new-tokens", 3)
    assert code == 3
    assert "2 good of 5 asked" in out
    records = [
        json.loads(line)
        for line in (tmp_path / "run" / "records" / "main.jsonl").read_text().splitlines()
    ]
    errors = {record["row_index"]: record["error"] for record in records if record["error"]}
    assert "null" in errors[1]
    assert "empty" in errors[2]
    assert "5003 tokens" in errors[3]


def test_another_config_is_refused(command):
    """Guards: two distributions in one dataset."""
    assert command("--num-examples", 1, "--max-new-tokens", 2)[0] == 0
    code, _, said = command("--num-examples", 1, "--max-new-tokens", 3, "--alpha-min", 0.4)
    assert code == 2
    assert "--alpha-min: 0.5 there, 0.4 now" in said
    assert "--max-new-tokens: 2 there, 3 now" in said
    assert "Choose another --output-dir, or give the options of the folder again" in said


def test_a_second_writer(command, tmp_path):
    """Guards: two processes in one file."""
    (tmp_path / "run" / "records").mkdir(parents=True)
    lock = Lock(tmp_path / "run" / "records" / "main.jsonl")
    code, _, said = command("--num-examples", 1)
    lock.release()
    assert code == 2
    assert "main.jsonl is being written by another process (pid" in said


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_an_unwritable_folder(command, folder):
    """Guards: a traceback, or models loaded before the folder is looked at."""
    code, _, said = command("--output-dir", folder)
    assert code == 2
    assert f"cannot write {folder}" in said
    assert "choose another --output-dir" in said


def test_bad_models(command, tmp_path):
    """Guards: a traceback of Transformers for a mistyped folder."""
    code, _, said = command("--student", tmp_path / "nothing")
    assert code == 2
    assert str(tmp_path / "nothing") in said
    (tmp_path / "empty").mkdir()
    code, _, said = command("--teacher", tmp_path / "empty")
    assert code == 2
    assert "config.json" in said


def test_tokenizers_that_differ(command, tmp_path):
    """Guards: mixing two models whose ids mean different things."""
    other = tmp_path / "other"
    shutil.copytree(
        toy_pair.path("toy-student"), other, ignore=shutil.ignore_patterns("*.safetensors")
    )
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, said = command("--student", other, "--granularity", "token")
    assert code == 2
    assert "id 97: student 'b', teacher 'a'" in said
    code, _, said = command("--student", other, "--engine", "toy")
    assert code == 2
    assert "the engine toy mixes tokens" in said
    assert "use the engine local" in said


def test_an_engine_that_cannot_start(command, monkeypatch):
    """Guards: a bug in an engine shown as a user's mistake, or a known failure shown as a
    traceback."""
    import optimal_sampling.engines
    from optimal_sampling.errors import EngineError

    def broken(*_):
        raise EngineError("out of memory on cuda:0")

    monkeypatch.setattr(optimal_sampling.engines, "open_engine", broken)
    code, _, said = command("--num-examples", 1)
    assert code == 1
    assert "error: out of memory on cuda:0" in said


def test_shards_are_merged_and_looked_at(command, tmp_path, capsys):
    """Guards: shards that only Python can put together, and a run that nobody can look at."""
    for part in range(2):
        folder = str(tmp_path / f"shard-{part}")
        code, *_ = command(
            *("--num-examples", 6, "--max-new-tokens", 3),
            *("--data-slice", f"{part}::2", "--output-dir", folder),
        )
        assert code == 0
    shards = [str(tmp_path / f"shard-{part}") for part in range(2)]
    assert main(["merge", *shards, "--output-dir", str(tmp_path / "all")]) == 0
    assert f"6 records in {tmp_path / 'all'}" in capsys.readouterr().out
    assert main(["status", *shards, str(tmp_path / "all")]) == 0
    said = capsys.readouterr().out
    assert said.count("3 good, 0 failed, 9 tokens") == 2
    assert "6 good, 0 failed, 18 tokens" in said
    assert said.count("0 of 3 asked") == 2
    assert main(["merge", *shards, "--output-dir", str(tmp_path / "all")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_merge_that_is_refused_writes_nothing(command, tmp_path, capsys):
    """Guards: half of the records in a new folder, which the next attempt then refuses; and a
    traceback where the new folder is a file."""
    shards = [str(tmp_path / f"shard-{part}") for part in range(2)]
    for part, folder in enumerate(shards):
        options = ("--num-examples", 4, "--max-new-tokens", 3, "--data-slice", f"{part}::2")
        assert command(*options, "--output-dir", folder)[0] == 0
    records = tmp_path / "shard-1" / "records" / "slice-1--2.jsonl"
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) // 2])  # an unfinished shard
    assert main(["merge", *shards, "--output-dir", str(tmp_path / "all")]) == 2
    assert "finish it first" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
    records.write_bytes(whole)
    (tmp_path / "file").touch()
    assert main(["merge", *shards, "--output-dir", str(tmp_path / "file")]) == 2
    assert "merge into a new folder" in capsys.readouterr().err
    assert main(["merge", *shards, "--output-dir", str(tmp_path / "all")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "name the run folders"),
        (["status", "nowhere"], "nowhere holds no records"),
        (["merge"], "there is no shard"),
        (["status", "a\0b"], "without NUL characters"),
        (["merge", "nowhere"], "cannot read nowhere/config.json"),
    ],
)
def test_folders_that_are_none(capsys, tmp_path, monkeypatch, arguments, message):
    """Guards: a traceback, or an empty folder of merged records."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_home_folder_in_every_path(command, tmp_path, monkeypatch, capsys):
    """Guards: `--output-dir=~/run`, which a shell does not expand, making a folder named `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("max_new_tokens: 2\noutput_dir: ~/other\n")
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1=?"}\n')
    code, *_ = command("--config", "~/run.yaml", "--dataset", "~/rows.jsonl", "--output-dir=~/run")
    assert code == 0
    assert main(["status", "~/run"]) == 0
    assert main(["merge", "~/run", "--output-dir=~/merged"]) == 0
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "merged" / "records" / "main.jsonl").exists()


def test_a_path_with_a_nul(command, tmp_path):
    """Guards: `ValueError: embedded null byte` with a traceback."""
    (tmp_path / "run.yaml").write_text('dataset: "rows\\0.jsonl"\n')
    for arguments in (["--config", tmp_path / "run.yaml"], ["--config", "a\0b"]):
        code, _, said = command(*arguments)
        assert code == 2
        assert "without NUL characters" in said


def test_a_baseline_on_the_command_line(command, tmp_path):
    """Guards: a baseline that needs another program, or is mixed into the records of q*."""
    arguments = ("--num-examples", 2, "--max-new-tokens", 3)
    code, out, said = command(*arguments, "--mode", "student")
    assert (code, "the student alone" in out) == (0, True)
    assert "drawn from the student alone" in said
    code, _, said = command(*arguments)
    assert code == 2
    assert "--mode: 'student' there, 'mixture' now" in said
    assert command(*arguments, "--mode", "both")[0] == 2


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["python", "scripts/generate_data.py", "--seed", "1"], None),
        (["/usr/bin/python3", "-m", "optimal_sampling", "generate", "--seed", "a b"], None),
        (["python", "-X", "dev", "-m", "optimal_sampling", "demo"], None),
        (["python", "/opt/env/bin/optimal-sampling", "demo"], "/opt/env/bin/optimal-sampling demo"),
        (["python", "/on/the/path/optimal-sampling", "demo"], "optimal-sampling demo"),
    ],
)
def test_the_command_to_go_on_is_the_one_that_was_typed(monkeypatch, words, shown):
    """Guards: `optimal-sampling --seed 1`, which is no command, after a script was interrupted."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/on/the/path/{name}")
    assert typed_command(words) == (shown or shlex.join(words))


def test_an_interrupted_script_tells_how_to_go_on(tmp_path):
    """Guards: a command to go on that is not the one that was typed, with a real Ctrl-C."""
    script = str(Path(__file__).parents[1] / "scripts" / "generate_data.py")
    words = [sys.executable, script, "--engine", "toy", "--num-examples", "20000"]
    words += ["--output-dir", str(tmp_path / "run")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if " done, " in line:
                break
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.rstrip().endswith(f"To go on:\n  {shlex.join(words)}")


def test_hints_to_install_name_what_an_index_has():
    """Guards: `pip install 'optimal-sampling[hub]'`, a package that no index has, and versions
    that are not those of pyproject.toml."""
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    known = {requirement for extra in extras.values() for requirement in extra}
    hints = 0
    for path in [*root.glob("src/**/*.py"), *root.glob("examples/*.py"), *root.glob("docs/*.md")]:
        text = path.read_text()
        assert "optimal-sampling[" not in text, path
        if path.suffix == ".md":  # names other packages too
            continue
        for hint in re.findall(r"pip install ((?:'[^'\n]+' ?)+)", text):
            required = {word for word in shlex.split(hint) if not word.startswith(".[")}
            hints += len(required)
            assert required <= known, path
    assert hints >= 5


@pytest.mark.parametrize("command", ["verify", "export", "status"])
def test_a_path_that_the_system_refuses(command, capsys):
    """Guards: a traceback for a path that is too long."""
    assert main([command, "x" * 300]) == 1
    assert "File name too long" in capsys.readouterr().err


def test_an_interrupted_benchmark_does_not_say_that_it_goes_on(monkeypatch, capsys):
    """Guards: "nothing had been started. To go on", after a minute of measuring."""

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimal_sampling.bench.run_bench", interrupted)
    assert main(["bench", "solver"]) == 130
    said = capsys.readouterr().err
    assert "nothing is kept of a measurement in progress. To begin again:" in said
