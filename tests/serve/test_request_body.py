"""Request bodies on their way to vLLM: limits and this package's fields."""

import pickle

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.request_options import OPTIONS, STUDENT_IDS, RequestOptions
from optimal_sampling.errors import ConfigError
from optimal_sampling.serve import ServeConfig, serve
from optimal_sampling.serve.request_body import (
    COMPLETIONS,
    RequestError,
    ServerSettings,
    translate_body,
)
from optimal_sampling.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def settings():
    vocabulary = Vocabulary.load("toy-student", "toy-teacher", False)
    return ServerSettings(vocabulary, MixtureConfig(alpha_min=0.25), 512, max_n=8)


def test_our_fields_become_extra_arguments(settings):
    """Guards: a field that vLLM drops with a warning, as it does with all it does not know."""
    body = {
        "prompt": "1+1=?",
        "student_prompt": "?",
        "alpha_method": "fixed",
        "fixed_alpha": 0.3,
        "temperature": 0.5,
    }
    passed = translate_body(body, COMPLETIONS, settings)
    assert not {"student_prompt", "alpha_method", "fixed_alpha"} & passed.keys()
    assert set(settings.vocabulary.stop_ids) <= set(passed["stop_token_ids"])
    assert passed["vllm_xargs"][STUDENT_IDS] == list(
        settings.vocabulary.student_tokenizer("?")["input_ids"]
    )
    read = RequestOptions.read(passed["vllm_xargs"], 0.5, settings.mixture)
    expected = MixtureConfig(alpha_method="fixed", fixed_alpha=0.3, alpha_min=0.25, temperature=0.5)
    assert read.mixture == expected
    alone = translate_body({"prompt": "x", "use_optimal_sampling": False}, COMPLETIONS, settings)
    assert RequestOptions.read(alone["vllm_xargs"], 1.0, settings.mixture).mode == "teacher"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"alpha_min": 2}, "alpha_min"),
        ({"alpha_min": "x"}, "alpha_min"),
        ({"alpha_method": "best"}, "alpha_method"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_optimal_sampling": "no"}, "use_optimal_sampling"),
        ({"student_prompt": ""}, "student_prompt"),
        ({"student_prompt": [1, 10**6]}, "student_prompt"),
        ({"student_prompt": [-1]}, "student_prompt"),
        ({"student_prompt": {"a": 1}}, "student_prompt"),
        ({"student_prompt": "9" * 600}, "student_prompt"),
        ({"student_messages": []}, "student_messages"),
        ({"prompt": ["a", "b"], "student_prompt": "c"}, "student_prompt"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"student_prompt": "c", "echo": True}, None),
        ({"vllm_xargs": {OPTIONS: "{}"}}, "vllm_xargs"),
        ({"vllm_xargs": 3}, "vllm_xargs"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
    ],
)
def test_wrong_fields_are_refused(settings, body, param):
    """Guards: a wrong option that reaches the worker, where it would end the engine for all."""
    with pytest.raises(RequestError) as caught:
        translate_body({"prompt": "1+1=?", **body}, COMPLETIONS, settings)
    assert caught.value.status == 400
    assert caught.value.param == param
    copied = pickle.loads(pickle.dumps(caught.value))
    assert vars(copied) == vars(caught.value)


def test_serving_to_others_needs_a_key():
    """Guards: an open server on every interface; temperatures silently not applied."""
    with pytest.raises(ConfigError, match="API key"):
        serve(ServeConfig(host="0.0.0.0"), {})
    with pytest.raises(ConfigError, match="temperature"):
        ServeConfig(mixture=MixtureConfig(temperature=0.5))
