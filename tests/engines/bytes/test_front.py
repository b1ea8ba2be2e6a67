"""Two tokenizers through the doors that users take: `load`, `generate`, `OptimalSamplingModel`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from optimal_sampling import OptimalSamplingModel, OptimalSamplingV1, load
from optimal_sampling.config import (
    DataConfig,
    FleetConfig,
    GenerateConfig,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    RunConfig,
    ServersOptions,
    Stage,
    ToyOptions,
    VerifyConfig,
    VllmOptions,
)
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.errors import ConfigError, TokenizerMismatchError
from optimal_sampling.generate import generate
from optimal_sampling.generate.dry_run import dry_run
from optimal_sampling.vocabulary import Vocabulary
from tests.engines.bytes.conftest import STUDENT_WORDS, small_tokenizer
from tests.engines.local.conftest import tiny_model


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    """A random model whose tokens are not those of the shipped teacher."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = small_tokenizer(STUDENT_WORDS)
    size = len(tokenizer)
    model = tiny_model(
        1, vocab=size + 5, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


STAGES = (Stage("alone", mode="student"), Stage("cut", mixture=MixtureConfig(top_p=0.9)))
SERVERS = ServersOptions(teacher_url=("http://127.0.0.1:1",), student_url=("http://127.0.0.1:2",))
VERIFY = VerifyConfig(verify="boxed")


def run(folder, student, **options):
    return GenerateConfig(
        models=ModelConfig(student=student, device="cpu"),
        data=DataConfig(num_examples=3),
        run=RunConfig(output_dir=str(folder), max_new_tokens=8, **options),
        engine=LocalOptions(kv_memory_gib=0.1),
    )


def records(folder):
    lines = (folder / "records" / "main.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_generate_takes_such_a_pair_without_further_options(tmp_path, student_folder):
    """Guards: ids of the teacher in the records, a text that is not what was drawn, per-byte
    numbers where nobody asked for them, a loss that only the engine knows.
    """
    summary = generate(run(tmp_path / "run", student_folder))
    tokenizer = small_tokenizer(STUDENT_WORDS)
    for record in records(tmp_path / "run"):
        assert record["granularity"] == "byte"
        assert record["canonical_ids"]
        ids = [i for i in record["completion_ids"] if i != tokenizer.eos_token_id]
        assert tokenizer.decode(ids) == record["completion"]
        assert len(record["token_alpha"]) == len(record["completion_ids"]) <= 8
        assert record["lost_student"] >= 0
        assert "byte_alpha" not in record
    assert summary.means["lost_student"] is not None


def test_failed_completions_say_byte_too(tmp_path, student_folder):
    """Guards: records of one run that say different things of what was drawn."""
    rows = [{"problem": "1+1=?"}, {"problem": None}, {"problem": "1+" * 4000}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(run(tmp_path / "run", student_folder), data=DataConfig(dataset=str(data)))
    generate(config)
    found = records(tmp_path / "run")
    assert [record["granularity"] for record in found] == ["byte"] * 3
    assert sum(bool(record["error"]) for record in found) == 2


def test_lists_of_bytes_are_kept_on_request(tmp_path, student_folder):
    """Guards: lists that are as long as the tokens."""
    generate(run(tmp_path / "run", student_folder, byte_lists=True))
    for record in records(tmp_path / "run"):
        ended = record["finish_reason"] == "stop"
        count = len(record["completion"].encode()) + ended
        assert {len(record[f"byte_{name}"]) for name in ("alpha", "kl_student", "kl_teacher")} == {
            count
        }


def test_one_model_alone(tmp_path, student_folder):
    """Guards: a student alone that is seen as bytes, and a teacher alone in its own ids."""
    for mode, granularity in (("student", "token"), ("teacher", "byte")):
        generate(run(tmp_path / mode, student_folder, mode=mode))
        found = records(tmp_path / mode)
        assert {record["granularity"] for record in found} == {granularity}
        assert {record["error"] for record in found} == {""}


@pytest.mark.slow
def test_a_fleet_makes_the_same_records(tmp_path, student_folder):
    """Guards: workers that mix tokens, or whose completions lose what bytes have."""
    alone = run(tmp_path / "alone", student_folder, byte_lists=True)
    fleet = replace(
        run(tmp_path / "fleet", student_folder, byte_lists=True), fleet=FleetConfig(workers=2)
    )
    found = []
    for config in (alone, fleet):
        generate(config)
        kept = [
            {name: value for name, value in record.items() if name not in ("seconds", "checksum")}
            for record in records(Path(config.run.output_dir))
        ]
        found.append({record["id"]: record for record in kept})
    assert found[0] == found[1]


def test_which_engine_and_which_refuse(student_folder):
    """Guards: another engine that mixes ids which mean different things, or says only no."""
    models = ModelConfig(student=student_folder, device="cpu")
    assert isinstance(load(models, engine=LocalOptions(kv_memory_gib=0.1)), ByteEngine)
    same = ModelConfig(device="cpu")
    assert type(load(same, engine=LocalOptions(kv_memory_gib=0.1))) is LocalEngine
    for options in (VllmOptions(), ToyOptions()):
        with pytest.raises(TokenizerMismatchError, match=r"use the engine local.*tokenizers\.md"):
            load(models, engine=options)
    with pytest.raises(TokenizerMismatchError, match=r"asks for bytes: use the engine local"):
        load(ModelConfig(device="cpu", granularity="byte"), engine=VllmOptions())
    with pytest.raises(TokenizerMismatchError, match="--granularity byte"):
        load(ModelConfig(student=student_folder, device="cpu", granularity="token"))
    with pytest.raises(TokenizerMismatchError, match="--engine local"):
        OptimalSamplingV1("toy-teacher", student_folder)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"mixture": MixtureConfig(top_p=0.9)}, ConfigError, "teacher_support_top_p"),
        ({"mixture": MixtureConfig(top_k=5)}, ConfigError, "teacher_support_top_k"),
        ({"engine": LocalOptions(top_tokens=3)}, ConfigError, "top_tokens"),
        ({"engine": VllmOptions()}, TokenizerMismatchError, "use the engine local"),
        ({"engine": ToyOptions()}, TokenizerMismatchError, "use the engine local"),
        ({"engine": SERVERS}, TokenizerMismatchError, "servers mixes tokens.*use the engine local"),
        ({"stages": STAGES, "verify": VERIFY}, ConfigError, "teacher_support_top_p"),
    ],
)
def test_refusals_come_first(tmp_path, student_folder, changes, error, said):
    """Guards: a dry run that finds nothing, models loaded and folders made for a run that cannot
    be; a stage that is refused after the others have run.
    """
    config = replace(run(tmp_path / "run", student_folder), **changes)
    for call in (generate, dry_run):
        with pytest.raises(error, match=said):
            call(config)
    assert not (tmp_path / "run").exists()


def test_the_class_for_lists_of_prompts(student_folder):
    """Guards: texts decoded from the ids of the wrong model."""
    with pytest.warns(UserWarning, match="byte by byte"):
        sampler = OptimalSamplingModel(
            student_folder, "toy-teacher", device="cpu", kv_memory_gib=0.1, byte_tolerance=0.02
        )
    with sampler:
        output = sampler.generate(["1+1=?", "2*3=?"], max_new_tokens=6)
        again = sampler.generate(["2*3=?"], max_new_tokens=6)
    assert output.errors == ["", ""]
    assert output.generated_texts[1] == again.generated_texts[0]
    assert output.alpha_values.shape == output.generated_ids.shape


def test_one_tokenizer_can_be_asked_to_mix_bytes():
    """Guards: `byte` that is taken only where tokenizers differ; padded rows taken for a
    difference.
    """
    pair = "toy-student", "toy-teacher"
    assert Vocabulary.load(*pair, granularity="auto").granularity == "token"
    vocabulary = Vocabulary.load(*pair, granularity="byte")
    assert vocabulary.granularity == "byte"
    tables = vocabulary.bytes_by_role
    assert tables["student"].of_id == tables["teacher"].of_id
    assert tables["student"].of_id[vocabulary.student_tokenizer.eos_token_id] is None
