"""The scripts in benchmarks/vllm: the GPU script end to end, and the distributions compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.engines.vllm.tiny import CONTEXT, VOCAB, Pair, log_softmax

SCRIPTS = Path(__file__).parents[3] / "benchmarks" / "vllm"


def test_the_gpu_script_with_small_shapes():
    """Guards: a script that breaks before anybody has the GPU to run it on."""
    command = [sys.executable, str(SCRIPTS / "gpu.py"), "--tiny", "--repeats", "1", "--prompt", "8"]
    command += ["--engines", "teacher", "student", "lockstep", "drafts"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["works"] == [[2, 8], [4, 16]]
    table = found["wall"]
    for place in range(2):
        ideal = table["teacher"][place] + table["student"][place]
        assert table["lockstep / ideal"][place] == pytest.approx(ideal / table["lockstep"][place])
        assert table["drafts / teacher"][place] == pytest.approx(
            table["teacher"][place] / table["drafts"][place]
        )


def test_one_engine_nested_in_another_mixes(folders, monkeypatch):
    """Guards: a rival that is slow because it does something else."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from engines import Setup, plain_core
    from nested import StudentInside

    pair = Pair(folders["student"], folders["teacher"])
    paths = {"student": pair.student, "teacher": pair.teacher}
    setup = Setup(
        "nested", vocab=VOCAB, context=CONTEXT, batch=4, prompt=4, drafts=0, gpu=False, **paths
    )
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    inner = plain_core(setup, pair.student, max_logprobs=-1, enable_prefix_caching=True)
    monkeypatch.setattr(StudentInside, "student", inner, raising=False)
    settings = {
        "logits_processors": [StudentInside],
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
    }
    outer = plain_core(setup, pair.teacher, **settings)
    asked = SamplingParams(max_tokens=5, logprobs=-1, ignore_eos=True, detokenize=False)
    prompts = {"a": [1, 2, 3], "b": [4], "c": [5] * 40}
    for name, ids in prompts.items():
        outer.add_request(name, {"prompt_token_ids": ids}, asked)
    done = {}
    while outer.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in outer.step() if output.finished}
    for core in (outer, inner):
        core.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    for name, ids in prompts.items():
        for place, row in enumerate(done[name].logprobs):
            text = [*ids, *done[name].token_ids[:place]]
            wanted = log_softmax(sum(log_softmax(pair.logits(role, text)) for role in paths) / 2)
            assert np.array([row[i].logprob for i in range(VOCAB)]) == pytest.approx(
                wanted, abs=1e-4
            )
