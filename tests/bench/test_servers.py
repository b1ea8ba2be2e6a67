"""The benchmark of servers, over fake ones."""

import json

from rich.console import Console

from optimal_sampling.bench import parse_bench, run_bench
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.vocabulary import Vocabulary


def test_it_measures_four_systems(tmp_path):
    """Guards: a table that compares systems on different work, or leaves one out."""
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
        for role, server in (("student", student), ("teacher", teacher), ("mixture", teacher)):
            words += [f"--{role}-url", server.url]
        assert run_bench(parse_bench(words, "bench"), Console(quiet=True)) == 0
    rows = json.loads(output.read_text())["results"]
    assert len({row["system"] for row in rows}) == 4
    assert all(row["tokens_per_second"] > 0 for row in rows)
    (rounds,) = [row for row in rows if row["tokens_per_round"]]
    assert rounds["system"] == "speculative rounds"
    assert rounds["bound"] > 0
