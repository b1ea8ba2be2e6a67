"""`generate` over two fake servers: records, resumes, options."""

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from optimal_sampling import generate
from optimal_sampling.cli import parse_generate
from optimal_sampling.config import (
    DataConfig,
    GenerateConfig,
    ModelConfig,
    RunConfig,
    ServersOptions,
)
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.errors import (
    ConfigError,
    EngineError,
    RunFolderError,
    TokenizerMismatchError,
)
from optimal_sampling.generate.progress import Progress
from optimal_sampling.records import load
from optimal_sampling.vocabulary import resolve_model

SIZE, KEY = 264, "sk-very-secret"


@pytest.fixture(scope="module")
def models():
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("toy-student"))
    tables = random_tables(SIZE)
    shared = {"tokenizer": tokenizer, "stop_ids": frozenset({257}), "context_length": 512}
    return [
        FakeModel(4 * table, name=name, **shared)
        for table, name in zip(tables, ("small", "large"), strict=True)
    ]


@pytest.fixture
def servers(models):
    with FakeServer(models[0]) as student, FakeServer(models[1]) as teacher:
        yield {"student_url": (student.url,), "teacher_url": (teacher.url,)}


class Shifted:
    """Another tokenizer."""

    def __call__(self, text, **options):
        return {"input_ids": [byte + 1 for byte in text.encode()]}

    def decode(self, ids):
        return bytes(token - 1 for token in ids).decode(errors="replace")


def config_of(folder, servers, **options):
    given = {"server_retry_seconds": 1.0, **servers, **options}
    return GenerateConfig(
        models=ModelConfig(device="cpu"),
        data=DataConfig(num_examples=2),
        run=RunConfig(output_dir=str(folder), max_new_tokens=8),
        engine=ServersOptions(**given),
    )


def test_records_and_summary_say_how_far_q_may_be(servers, tmp_path):
    """Guards: a run whose error nobody sees."""
    summary = generate(config_of(tmp_path, servers))
    records = list(load(tmp_path))
    assert (summary.status, len(records)) == ("complete", 2)
    for record in records:
        assert 0 < record["tv_bound"] <= record["tv_bound_max"] <= 1
        assert 0 < record["covered_student"] < 1
    largest = max(record["tv_bound_max"] for record in records)
    assert summary.means["tv_bound_max"] == largest
    assert summary.means["tv_bound"] <= largest
    assert summary.notes["student_server"] == "small, context 512 (fake)"
    assert "requests" in summary.notes["teacher_requests"]
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved["means"]["tv_bound_max"] == largest


def test_a_run_goes_on_at_other_addresses_with_the_same_models(models, servers, tmp_path):
    """Guards: a resume that mixes two models, or that is refused after a move."""
    generate(config_of(tmp_path, servers))
    more = DataConfig(num_examples=3)
    with FakeServer(models[0]) as student, FakeServer(models[1]) as teacher:
        moved = {"student_url": (student.url,), "teacher_url": (teacher.url,)}
        assert generate(replace(config_of(tmp_path, moved), data=more)).generated == 1
        swapped = {"student_url": (teacher.url,), "teacher_url": (student.url,)}
        with pytest.raises(RunFolderError, match="model of the student's server: 'small, context"):
            generate(config_of(tmp_path, swapped))
    compared = json.loads((tmp_path / "config.json").read_text())["compared"]
    assert compared["teacher_served"] == "large, context 512"
    assert "teacher_url" not in compared


def test_a_run_does_not_go_on_with_lists_of_another_length(models, servers, tmp_path):
    """Guards: records of one run from lists of two lengths, where the server's limit is below what
    was asked for."""
    generate(config_of(tmp_path, servers, server_top_k=30))
    with FakeServer(replace(models[0], max_logprobs=25)) as student:
        moved = {**servers, "student_url": (student.url,)}
        with pytest.raises(RunFolderError, match=r"lists of 20' there, .* lists of 25' now"):
            generate(config_of(tmp_path, moved, server_top_k=30))


def test_one_model_alone_asks_one_server(servers, tmp_path):
    """Guards: a baseline that needs both servers."""
    only = {"teacher_url": servers["teacher_url"]}
    config = config_of(tmp_path, only)
    summary = generate(replace(config, run=replace(config.run, mode="teacher")))
    assert summary.good == 2
    with pytest.raises(ConfigError, match="address of the student's server: --student-url"):
        generate(config_of(tmp_path / "other", only))


def test_no_key_is_written(models, tmp_path, monkeypatch):
    """Guards: a key in a record, the config, a note or an error."""
    monkeypatch.setenv("OUR_KEY", KEY)
    keyed = [replace(model, api_key=KEY) for model in models]
    keys = {"student_api_key_env": "OUR_KEY", "teacher_api_key_env": "OUR_KEY"}
    with FakeServer(keyed[0]) as student, FakeServer(keyed[1]) as teacher:
        urls = {"student_url": (student.url,), "teacher_url": (teacher.url,)}
        with pytest.raises(EngineError, match="unauthorized") as refused:
            generate(config_of(tmp_path, urls))
        generate(config_of(tmp_path, urls, **keys))
        file = tmp_path.parent / "key"
        file.write_text(f"{KEY}\n")
        files = {"student_api_key_file": str(file), "teacher_api_key_file": str(file)}
        generate(config_of(tmp_path / "by_file", urls, **files))
        with pytest.raises(ConfigError, match="teacher_api_key_file: give one of them"):
            config_of(tmp_path, urls, **keys, **files)
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) >= 3
    assert not any(KEY in text for text in [*texts, str(refused.value)])
    monkeypatch.delenv("OUR_KEY")
    with pytest.raises(ConfigError, match="variable OUR_KEY holds no API key"):
        generate(config_of(tmp_path, urls, **keys))


class AfterOne(Progress):
    """Calls `change` when a record is written."""

    def __init__(self, change):
        self.change = change

    def update(self, tally):
        if tally.done:
            self.change()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"api_key": KEY}, "unauthorized: status 401"),
        ({"name": "other"}, "wrong_model: it is not what it was when the run began: its name"),
    ],
)
def test_a_run_whose_server_refuses_it_goes_on_later(servers, models, tmp_path, changes, reason):
    """Guards: all rows that are left recorded as failed, three times over, because a key was
    revoked or a server started again with another model."""
    config = config_of(tmp_path, servers, batch_size=2)
    config = replace(config, data=DataConfig(num_examples=8))
    with FakeServer(models[1]) as teacher:
        config = replace(config, engine=replace(config.engine, teacher_url=(teacher.url,)))

        def refuse():
            teacher._http.model = replace(models[1], **changes)

        with pytest.raises(EngineError, match=rf"^the teacher's server {teacher.url}: {reason}"):
            generate(config, AfterOne(refuse))
        records = list(load(tmp_path, failed=True))
        assert 1 <= len(records) < 8
        assert not [record["error"] for record in records if record["error"]]
        teacher._http.model = models[1]
        summary = generate(config)
    assert (summary.good, summary.already_good, summary.failed) == (8, len(records), 0)


def test_another_tokenizer_is_found_at_the_start(servers, models, tmp_path):
    """Guards: ids of one tokenizer sent to a model of another."""
    shifted = replace(models[1], tokenizer=Shifted())
    with FakeServer(shifted) as teacher, pytest.raises(TokenizerMismatchError, match="--teacher"):
        generate(config_of(tmp_path, servers | {"teacher_url": (teacher.url,)}))


def test_options_of_the_command_line():
    """Guards: a list of servers that is one address."""
    command = "--engine servers --teacher-url http://a:1,http://b:2 --teacher-url https://c"
    command += " --student-url http://d:4 --server-top-k 40 --tv-tolerance 0.01 --draft-tokens 3"
    engine = parse_generate(command.split()).generate_config().engine
    assert engine.teacher_url == ("http://a:1", "http://b:2", "https://c")
    assert engine.student_url == ("http://d:4",)
    assert (engine.server_top_k, engine.tv_tolerance, engine.draft_tokens) == (40, 0.01, 3)
    with pytest.raises(ConfigError, match="server_top_k must be -1"):
        ServersOptions(server_top_k=0)
