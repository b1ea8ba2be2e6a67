"""The benchmark of servers, over fake ones."""

import json

import pytest
from rich.console import Console

from optimal_sampling.bench import parse_bench, run_bench
from optimal_sampling.bench.subcommands import ServersBenchOptions
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.errors import ConfigError
from optimal_sampling.vocabulary import Vocabulary


@pytest.mark.parametrize("roles", ["student teacher mixture", "student teacher"])
def test_it_measures_all_servers(tmp_path, roles):
    """Guards: a table that compares systems on different work, or leaves one out, and servers that
    are started in place of those that were named.
    """
    vocabulary = Vocabulary.load("toy-student", "toy-teacher")
    output = tmp_path / "servers.json"
    tables = random_tables(vocabulary.size)
    for table in tables:
        table[:, min(vocabulary.stop_ids)] += 5  # short texts
    student, teacher = (
        FakeServer(
            FakeModel(
                table,
                name=name,
                stop_ids=vocabulary.stop_ids,
                tokenizer=vocabulary.student_tokenizer,
            )
        )
        for name, table in zip(("toy-student", "toy-teacher"), tables, strict=True)
    )
    with student, teacher:
        words = ["servers", "--sequences", "2", "--repeats", "1", "--output", str(output)]
        addresses = {"student": student.url, "teacher": teacher.url, "mixture": teacher.url}
        for role in roles.split():
            words += [f"--{role}-url", addresses[role]]
        assert run_bench(parse_bench(words, "bench"), Console(quiet=True)) == 0
    rows = json.loads(output.read_text())["results"]
    assert len({row["system"] for row in rows}) == len(roles.split()) + 1
    assert all(row["tokens_per_second"] > 0 for row in rows)
    (rounds,) = [row for row in rows if row["tokens_per_round"]]
    assert rounds["system"] == "speculative rounds"
    assert rounds["bound"] > 0


def test_one_address_is_too_few():
    """Guards: an address that is ignored, and vLLM started in its place."""
    with pytest.raises(ConfigError, match="both --student-url and --teacher-url"):
        ServersBenchOptions(student_url="http://127.0.0.1:1")
