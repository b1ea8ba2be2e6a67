"""The documentation: its links, its commands, and the pages and figures that are made of the code.

Code blocks say after the language what they need (GitHub does not show it):

    run              run here, on small sizes, in a folder with the run folder outputs/run
    toy              run by tests/test_pipeline.py
    needs=GPU,hub    not run; which words there are is in NEEDS

Every command of every shell block is split by bash itself and parsed by the real parser.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import draw_theory
import pytest
import reference_pages
import tyro

import optimal_sampling
from optimal_sampling import cli
from optimal_sampling.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "GPU": "a GPU",
    "cluster": "machines of Slurm, SSH or Ray",
    "files": "files or run folders of your own",
    "hub": "models or datasets of the hub",
    "install": "a package index",
    "options": "options of your own in place of ...",
    "servers": "two OpenAI-compatible servers",
    "time": "minutes or more; its parts are tested elsewhere",
    "vLLM": "the extra vllm",
}
SHELLS = ("sh", "bash")
SMALL = {
    "generate": ["--num-examples", "2", "--max-new-tokens", "12"],
    "evaluate": ["--num-examples", "2", "--samples", "1", "--pass-at", "1"],
}
"""Options that make a command short; they come last, and win."""
KNOWN_PROGRAMS = {
    "accelerate",
    "curl",
    "llama-server",
    "lm_eval",
    "python",
    "ray",
    "sbatch",
    "torchrun",
    "trl",
}
FOREIGN_FLAGS = {
    "--bf16",
    "--cache-type-k",
    "--cache-type-v",
    "--ctx-size",
    "--distributed-executor-backend",
    "--flash-attn",
    "--interleaved",
    "--kv-unified",
    "--model-draft",
    "--model-init-kwargs",
    "--parallel",
    "--reverse-prompt",
    "--spec-type",
    "--teacher-support",
}
"""Of TRL, vLLM and llama.cpp; and the beginnings of several of our own."""


class Block(NamedTuple):
    """A code block of a page."""

    page: Path
    line: int
    language: str
    info: str
    text: str

    @property
    def name(self) -> str:
        """Where it is."""
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    start, lines = None, page.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```") and start is None:
            start = number
        elif line == "```" and start is not None:
            language, _, info = lines[start - 1].removeprefix("```").partition(" ")
            yield Block(page, start, language, info, "\n".join(lines[start : number - 1]))
            start = None
    assert start is None, f"{page.name}: the block of line {start} does not end"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language in SHELLS]
RUN_BLOCKS = [block for block in BLOCKS if block.info == "run"]
PROSE = {
    page: re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for page in PAGES
}


def names(blocks: list[Block]) -> Any:
    """Parameters with their places as names."""
    return [pytest.param(block, id=block.name) for block in blocks]


# What is made of the code


def test_the_figure_of_the_theory_is_current():
    """Guards: a figure of another pair than the script's, whose numbers it shows."""
    assert (ROOT / "docs/theory.svg").read_text("utf-8") == draw_theory.figure()


@pytest.mark.parametrize("name", ["cli", "api"])
def test_reference_pages_are_current(name):
    """Guards: an option, a default or a signature that the reference does not have."""
    page = getattr(reference_pages, f"{name}_page")()
    found = (ROOT / f"docs/{name}.md").read_text("utf-8")
    assert found == page, "write them again: python scripts/reference_pages.py"


def test_every_public_name_and_command_is_in_the_reference():
    """Guards: a generator that leaves one out."""
    api, command_line = ((ROOT / f"docs/{name}.md").read_text("utf-8") for name in ("api", "cli"))
    for name in optimal_sampling.__all__:
        assert f"\n### {name}\n" in api
    for name in cli.COMMANDS:
        assert f"\n## {name}\n" in command_line
    assert "`--alpha-method kl_symmetry/" in command_line
    assert "`--gpu-memory-utilization" in command_line  # an engine other than the default one


# Links


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found[anchor] = found.get(anchor, -1) + 1
        if count:
            found[f"{anchor}-{count}"] = 0
    return {*found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Guards: a link to a page, a file or a heading that was renamed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors_of(PROSE.get(file) or file.read_text("utf-8")), target


def test_the_index_has_every_page():
    """Guards: a page that nobody finds."""
    linked = re.findall(r"\]\(([\w-]+\.md)\)", PROSE[ROOT / "docs/index.md"])
    assert sorted(linked) == sorted(
        {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    )


# Commands


def test_every_block_says_what_it_needs():
    """Guards: a command that is not run and does not say why."""
    for block in BLOCKS:
        if block.language not in (*SHELLS, "python"):
            continue
        assert block.info, f"{block.name} says neither `run` nor what it needs"
        if block.info not in ("run", "toy"):
            assert {*block.info.removeprefix("needs=").split(",")} <= NEEDS.keys(), block.name


def test_commands_are_in_marked_blocks():
    """Guards: an indented command, which carries no mark and is parsed by nobody."""
    for page, text in PROSE.items():
        found = re.findall(r"\n\n {4}(?:optimal-sampling|python|pip|make) .*", text)
        assert found == [], page.name
    for block in BLOCKS:
        if block.language not in (*SHELLS, "python", "json", "yaml"):
            found = re.findall(
                r"^(?:optimal-sampling|python3?|pip|make|export) .*", block.text, re.M
            )
            assert found == [], f"{block.name}: say ```sh and what it needs"


RECORD = """
command_not_found_handle() {
    # In one write, as background jobs write too: bash writes at every line break.
    printf '%s\\0' "$@" $'\\x1e' >> "$TO"
}
PATH=/nowhere
set -eu
"""


def commands_of(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a shell block as bash splits them; none of them is run.

    Nothing is on the PATH, so that bash hands every command to RECORD. Files of this repository
    that are run by their paths are stood for by a script that does the same.
    """
    text = re.sub(r"\s(\.\.\.|…)(?=\s|$)", " ", block.text)
    log = folder / "commands"
    log.touch()
    for name in ("examples", "scripts"):
        for path in (ROOT / name).rglob("*.sh"):
            stand_in = folder / path.relative_to(ROOT)
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.write_text(f'#!/bin/bash\n{RECORD}command_not_found_handle "$0" "$@"\n')
            stand_in.chmod(0o755)
    environment = {"TO": str(log), "OPTIMAL_SAMPLING_API_KEY": "key"}
    done = subprocess.run(
        ["/bin/bash", "-c", RECORD + text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = log.read_text().split("\0")[:-1]
    result: list[list[str]] = [[]]
    for word in words:
        if word == "\x1e":
            result.append([])
        else:
            result[-1].append(word)
    return [command for command in result if command]


class Parsed(Exception):
    """The options of a command are right."""


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line of `optimal-sampling` as the command does, and stops there."""

    def stop_after(function):
        def parsed(*args, **kwargs):
            function(*args, **kwargs)
            raise Parsed

        return parsed

    monkeypatch.setattr(tyro, "cli", stop_after(tyro.cli))
    over = tyro.extras.overridable_config_cli
    monkeypatch.setattr(tyro.extras, "overridable_config_cli", stop_after(over))

    def run(words):
        with pytest.raises(Parsed):
            cli.COMMANDS[words[0]][1](words[1:])

    return run


def check_command(words: list[str], parse: Any) -> None:
    """Fails where a command could not be run as it is written."""
    program, *rest = words
    if program == "optimal-sampling":
        parse(rest)
    elif "optimal_sampling" in rest:
        parse(rest[rest.index("optimal_sampling") + 1 :])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {
            name
            for word in rest
            for each in re.findall(r"\[(.*)\]", word)
            for name in each.split(",")
        }
        assert rest[0] == "install"
        assert extras <= project["optional-dependencies"].keys()
    elif program in ("python", "python3") and rest[0] != "-c":
        check_script(rest)
    else:
        assert program in KNOWN_PROGRAMS or (ROOT / program).exists(), program


def check_script(words: list[str]) -> None:
    """A script, or a module of this repository, has the options that it is given."""
    place = words[1].replace(".", "/") if words[0] == "-m" else words[0].removesuffix(".py")
    file, folder = ROOT / f"{place}.py", ROOT / place
    assert file.exists() or folder.is_dir(), place
    sources = [file] if file.exists() else sorted(folder.glob("*.py"))
    source = "".join(path.read_text() for path in sources)
    for flag in (word for word in words if word.startswith("--")):
        assert flag in source or flag.removeprefix("--").replace("-", "_") in source, flag


@pytest.mark.parametrize("block", names(SHELL_BLOCKS))
def test_commands_parse(block, tmp_path, parse, monkeypatch):
    """Guards: a command of the docs with an option that was renamed, or a value it cannot have."""
    monkeypatch.chdir(tmp_path)
    for name in ("run.yaml", "stages.yaml"):
        Path(name).touch()
    commands = commands_of(block, tmp_path)
    assert commands
    for words in commands:
        check_command(words, parse)


def test_a_wrong_command_would_be_noticed(tmp_path, parse, capsys):
    """Guards: the tests above pass whatever the docs say."""
    block = Block(
        ROOT / "x.md", 1, "sh", "run", "optimal-sampling status \\\n    $'a\\tb' # c\nx=1\n"
    )
    assert commands_of(block, tmp_path) == [["optimal-sampling", "status", "a\tb"]]
    with pytest.raises(SystemExit):
        parse(["generate", "--alpha-floor", "0.5"])
    with pytest.raises((ConfigError, SystemExit)):
        parse(["generate", "--alpha-min", "7"])
    with pytest.raises(AssertionError):
        check_command(["python", "benchmarks/interval_coverage.py", "--rounds"], parse)
    with pytest.raises(AssertionError):
        check_command(["make", "tests"], parse)
    capsys.readouterr()


def test_options_named_in_the_text_exist():
    """Guards: prose about an option that was renamed."""
    known = {*re.findall(r"--[a-z0-9-]+", (ROOT / "docs/cli.md").read_text().replace("_", "-"))}
    for pattern in ("scripts/*.py", "benchmarks/**/*.py", "examples/**/*.sh"):
        for path in ROOT.glob(pattern):
            known |= {*re.findall(r"--[a-z0-9-]+", path.read_text().replace("_", "-"))}
    for page, text in PROSE.items():
        for code in re.findall(r"`([^`]+)`", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", code):
                name = flag.replace("_", "-").rstrip("-").replace("--no-", "--")
                assert name in known | FOREIGN_FLAGS or f"--no-{name[2:]}" in known, (
                    page.name,
                    flag,
                )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder with a small outputs/run, in which the blocks run one after the other."""
    folder = tmp_path_factory.mktemp("docs")
    words = ["generate", "--dataset", "synthetic", "--output-dir", str(folder / "outputs/run")]
    assert cli.main([*words, "--num-examples", "3", "--max-new-tokens", "60"]) == 0
    return folder


@pytest.mark.xdist_group("docs")  # in the order of the pages: some go on from others
@pytest.mark.parametrize("block", names([b for b in RUN_BLOCKS if b.language in SHELLS]))
def test_commands_run(block, run_folder, tmp_path, monkeypatch, capsys):
    """Guards: a command that parses and then fails."""
    monkeypatch.chdir(run_folder)
    for program, name, *rest in commands_of(block, tmp_path):
        assert program == "optimal-sampling"
        assert cli.main([name, *rest, *SMALL.get(name, [])]) == 0, capsys.readouterr()


@pytest.mark.parametrize("block", names([b for b in BLOCKS if b.language == "python"]))
def test_python_examples(block, capsys):
    """Guards: an example that is no Python, or that no longer fits the package."""
    code = compile(block.text, block.name, "exec")
    for module in re.findall(r"^from (optimal_sampling[\w.]*) import", block.text, re.MULTILINE):
        assert (ROOT / "src" / module.replace(".", "/")).exists() or (
            ROOT / "src" / f"{module.replace('.', '/')}.py"
        ).exists()
    if block.info == "run":
        exec(code, {})
        assert "nan" not in capsys.readouterr().out
