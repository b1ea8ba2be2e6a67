"""The run folder: what is owed, and which config it was made with."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from optimal_sampling.config import (
    ENGINES,
    DataConfig,
    GenerateConfig,
    LocalOptions,
    MixtureConfig,
    RunConfig,
)
from optimal_sampling.errors import RunFolderError, StorageError
from optimal_sampling.records import RunFolder, load
from optimal_sampling.records import store as store_module
from optimal_sampling.records.run_folder import MAY_DIFFER, compared, config_hash, flat
from optimal_sampling.records.schema import key_of
from optimal_sampling.records.store import encode_line


@pytest.fixture
def config(tmp_path):
    return GenerateConfig(run=RunConfig(output_dir=str(tmp_path / "run")))


def start(config, make_record):
    """Make the folder, with one record."""
    with RunFolder(config) as folder:
        folder.add(make_record(99))


def test_option_names_are_unique():
    """Guards: two sections with a field of one name, which would be one flag and one entry of
    config.json.
    """
    for engine in ENGINES.values():
        config = GenerateConfig(engine=engine())
        parts = [getattr(config, item.name) for item in fields(config) if item.name != "stages"]
        names = [item.name for part in parts for item in fields(part)]
        assert len(names) == len(set(names))
        assert flat(config).keys() == {*names, "engine", "stages"}


def test_options_that_may_differ_exist():
    """Guards: a renamed option that is silently compared, or silently not."""
    names = {name for engine in ENGINES.values() for name in flat(GenerateConfig(engine=engine()))}
    assert names >= MAY_DIFFER


def test_options_that_may_differ_are_documented():
    """Guards: docs/records.md naming an option that is refused, or leaving out one that is not."""
    page = (Path(__file__).parents[2] / "docs" / "records.md").read_text("utf-8")
    _, _, section = page.partition("## Another config\n")
    section, _, _ = section.partition("\n## ")
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `--")]
    flags = re.findall(r"`--([a-z-]+)`", " ".join(rows))
    assert {flag.replace("-", "_") for flag in flags} == MAY_DIFFER


def test_what_is_owed(config, make_record):
    """Guards: making a good sample again, forgetting a failed one, and retrying for ever."""
    with RunFolder(config) as folder:
        folder.add(make_record(0))
        folder.add(make_record(1, error="too long"))
        folder.add(make_record(2, error="too long", attempts=3))
    with RunFolder(config) as folder:
        owed = [number for number in range(4) if folder.ledger.owes((f"{number:032x}", 0), 3)]
        assert owed == [1, 3]
        assert folder.ledger.attempts((f"{1:032x}", 0)) == 1
        assert folder.ledger.owes((f"{0:032x}", 1), 3)
        assert folder.ledger.totals.records == 1


def test_the_latest_attempt_wins(config, make_record):
    """Guards: an old failure hiding the success, and one sample yielded twice."""
    with RunFolder(config) as folder:
        folder.add(make_record(0, error="NaN"))
        folder.add(make_record(1, error="NaN"))
        folder.add(make_record(1, error="NaN again", attempts=2))
        folder.add(make_record(0, attempts=2))
    assert [(record["row_index"], record["attempts"]) for record in load(folder.path)] == [(0, 2)]
    failed = [record for record in load(folder.path, failed=True) if record["error"]]
    assert [record["error"] for record in failed] == ["NaN again"]


def test_load_of_a_folder_without_records(tmp_path):
    """Guards: an empty answer for a mistyped folder."""
    with pytest.raises(RunFolderError, match="holds no records"):
        list(load(tmp_path))


def test_another_config_is_refused_with_a_diff(config, make_record):
    """Guards: records of two distributions in one folder."""
    start(config, make_record)
    other = replace(
        config, mixture=MixtureConfig(alpha_min=0.3, top_k=5), run=replace(config.run, seed=1)
    )
    with pytest.raises(RunFolderError) as caught:
        RunFolder(other)
    message = str(caught.value)
    assert "--alpha-min: 0.5 there, 0.3 now" in message
    assert "--top-k: -1 there, 5 now" in message
    assert "--seed: 0 there, 1 now" in message
    assert "Choose another --output-dir, or give the options of the folder again" in message
    RunFolder(config).close()


def test_speed_and_amount_may_change(config, make_record):
    """Guards: refusing to resume because of a smaller batch or more examples."""
    start(config, make_record)
    other = replace(
        config,
        engine=LocalOptions(batch_size=1, kv_memory_gib=0.5, prefill_chunk=7, draft_tokens=3),
        data=DataConfig(num_examples=5, samples_per_prompt=2, data_slice="1::3"),
        run=replace(config.run, max_attempts=9),
        models=replace(config.models, device="cpu"),
    )
    assert compared(flat(other)) == compared(flat(config))
    RunFolder(other).close()


def test_an_option_that_is_younger_than_the_folder(config, make_record):
    """Guards: a new version refusing every folder made before it had some option."""
    start(config, make_record)
    path = config_file(config)
    document = json.loads(path.read_text())
    del document["compared"]["schedule_tokens"]
    document["hash"] = config_hash(document["compared"])
    path.write_text(json.dumps(document))
    RunFolder(config).close()
    with pytest.raises(RunFolderError, match="--schedule-tokens: 256 there, 7 now"):
        RunFolder(replace(config, mixture=MixtureConfig(schedule_tokens=7)))


def config_file(config):
    return Path(config.run.output_dir) / "config.json"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"hash": "x", "compared": {}}'])
def test_a_damaged_config(config, text, make_record):
    """Guards: a traceback, or a new config written over the old one."""
    start(config, make_record)
    config_file(config).write_text(text)
    with pytest.raises(RunFolderError, match="restore it, or choose another --output-dir"):
        RunFolder(config)
    assert config_file(config).read_text() == text


def test_records_without_a_config(config, make_record):
    """Guards: adopting records of unknown origin."""
    with RunFolder(config) as folder:
        folder.add(make_record())
    config_file(config).unlink()
    with pytest.raises(RunFolderError, match=r"has records but no config\.json"):
        RunFolder(config)


def test_records_of_another_schema(config, make_record):
    """Guards: reading fields that mean something else."""
    start(config, make_record)
    path = config_file(config).parent / "records" / "main.jsonl"
    path.write_bytes(encode_line(make_record() | {"schema_version": 99}))
    with pytest.raises(RunFolderError, match="schema 99"):
        RunFolder(config)
    with pytest.raises(RunFolderError, match="schema 99"):
        list(load(path.parents[1]))


def test_damage_is_counted(config, make_record):
    """Guards: damage that nobody is told of; the damaged sample must be owed again."""
    with RunFolder(config) as folder:
        for number in range(3):
            folder.add(make_record(number))
    path = folder.file.path
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first.replace(b"answer", b"Answer") + second + third[:-9])
    with RunFolder(config) as folder:
        assert (folder.bad_lines, folder.torn_lines) == (1, 1)
        assert folder.ledger.good == {key_of(make_record(1)): 1}


def test_shards_share_a_folder(config, make_record):
    """Guards: eight commands with one --output-dir fighting over one file, or making each other's
    samples again.
    """
    first = replace(config, data=DataConfig(data_slice="0::2"))
    second = replace(config, data=DataConfig(data_slice="1::2"))
    with RunFolder(first) as a, RunFolder(second) as b:
        a.add(make_record(0))
        b.add(make_record(1))
    with RunFolder(config) as both:
        assert len(both.ledger.good) == 2
    assert len(list(load(both.path))) == 2


def test_a_live_neighbours_torn_tail_is_left_alone(config, make_record):
    """Guards: cutting a line that another process is writing at this moment."""
    other = replace(config, data=DataConfig(data_slice="0::2"))
    with RunFolder(other) as folder:
        folder.add(make_record(0))
    whole = folder.file.path.read_bytes()
    folder.file.path.write_bytes(whole + whole[:30])
    with RunFolder(config) as main:
        assert (main.torn_lines, main.bad_lines) == (0, 0)
    assert folder.file.path.read_bytes() == whole + whole[:30]


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_an_unwritable_run_folder(config, folder):
    """Guards: a traceback for a folder that cannot be."""
    with pytest.raises(RunFolderError, match="choose another --output-dir"):
        RunFolder(replace(config, run=replace(config.run, output_dir=folder)))


def test_a_full_disk_at_the_first_file(config, make_record, monkeypatch):
    """Guards: half a config.json, which would block the folder."""

    def full(fd):
        raise OSError(28, "No space left on device")

    def run():
        with RunFolder(config) as folder:
            monkeypatch.setattr(store_module.os, "fsync", full)
            folder.add(make_record())

    with pytest.raises(StorageError, match="No space left"):
        run()
    assert not [path for path in config_file(config).parent.iterdir() if path.is_file()]


def test_a_call_that_made_nothing_binds_nobody(config, make_record):
    """Guards: a first call with a wrong option that blocks its folder for the right one."""
    RunFolder(replace(config, mixture=MixtureConfig(alpha_min=0.1))).close()
    start(config, make_record)
    with pytest.raises(RunFolderError, match="--alpha-min"):
        RunFolder(replace(config, mixture=MixtureConfig(alpha_min=0.1)))


def test_two_processes_that_start_with_different_configs(config, make_record):
    """Guards: both finding no config.json, and both writing records."""
    other = replace(
        config, data=DataConfig(data_slice="0::2"), mixture=MixtureConfig(alpha_min=0.1)
    )
    with RunFolder(config) as first, RunFolder(other) as second:
        first.add(make_record(0))
        with pytest.raises(RunFolderError, match=r"--alpha-min: 0\.5 there, 0\.1 now"):
            second.add(make_record(1))
    assert [record["row_index"] for record in load(first.path)] == [0]
