"""Request bodies on their way to vLLM: limits and this package's fields."""

import pickle
from dataclasses import replace

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.request_options import OPTIONS, STUDENT_IDS, RequestOptions
from optimal_sampling.errors import ConfigError
from optimal_sampling.serve import ServeConfig, serve
from optimal_sampling.serve.request_body import (
    CHAT,
    COMPLETIONS,
    RequestError,
    ServerSettings,
    translate_body,
)
from optimal_sampling.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def settings():
    vocabulary = Vocabulary.load("toy-student", "toy-teacher", False)

    def render(role, body, name):  # as vLLM's renderer, which the tests of the server have
        tokenizer = getattr(vocabulary, f"{role}_tokenizer")
        return tuple(tokenizer.apply_chat_template(body["messages"])["input_ids"])

    return ServerSettings(vocabulary, MixtureConfig(alpha_min=0.25), 512, max_n=8, render=render)


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
        ({"alpha_minimum": 0.1}, "alpha_minimum"),
        ({"student_promt": "1"}, "student_promt"),
        ({"use_optimal_samplig": False}, "use_optimal_samplig"),
        ({"user": "x" * 70000}, "user"),
        ({"stop": ["x"] * 300}, "stop"),
        ({"student_prompt": "9" * 10**6}, "student_prompt"),
        ({f"a{i}": 1 for i in range(300)}, None),
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


def test_null_means_unset(settings):
    """Guards: clients whose classes send every field, null where it was not set."""
    body = {"prompt": "1+1=?", "alpha_min": None, "student_prompt": None, "alpha_stats": None}
    unset = {"use_optimal_sampling": None, "alpha_method": None}
    passed = translate_body({**body, **unset}, COMPLETIONS, settings)
    assert passed == translate_body({"prompt": "1+1=?"}, COMPLETIONS, settings)


def test_names_of_openai_and_of_lm_eval_are_no_misspelling(settings):
    """Guards: a field that is refused because it looks like one of ours."""
    names = (
        "audio best_of echo frequency_penalty function_call functions logit_bias logprobs "
        "max_completion_tokens max_tokens metadata min_p modalities model moderation n "
        "parallel_tool_calls prediction presence_penalty prompt_cache_key repetition_penalty "
        "reasoning_effort response_format safety_identifier seed service_tier stop store stream "
        "stream_options suffix temperature tool_choice tools top_k top_logprobs top_p truncation "
        "user verbosity web_search_options add_generation_prompt continue_final_message until"
    )
    body = {"prompt": "1", **dict.fromkeys(names.split())}
    assert translate_body(body, COMPLETIONS, settings).keys() >= set(names.split())


def test_parts_of_a_content_reach_vllms_renderer_if_they_are_texts(settings):
    """Guards: a 400 for the standard form of a message; an address that vLLM would fetch."""
    rendered = []

    def render(role, body, name):
        rendered.append((role, body["messages"], name))
        return (1,)

    def translate(content):
        message = {"role": "user", "content": content}
        body = {"messages": [{"role": "user", "content": "1"}], "student_messages": [message]}
        translate_body(body, CHAT, replace(settings, render=render))
        return message

    message = translate([{"type": "text", "text": "1+1"}, {"type": "text", "text": "=?"}])
    assert rendered == [("student", [message], "student_messages")]
    for wrong in ([{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text"}], [3]):
        with pytest.raises(RequestError, match="must be texts"):
            translate(wrong)


class Untouched:
    """A tokenizer that must not be asked."""

    def get_vocab(self):
        return {"12": 0}

    def __getattr__(self, name):
        raise AssertionError(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": 3},
        {"student_messages": [{"role": "user", "content": "9" * 2000}]},
    ],
)
def test_what_a_client_sends_is_checked_before_it_is_run(settings, fields):
    """Guards: seconds of a client's own template, or of megabytes in a tokenizer."""
    vocabulary = replace(settings.vocabulary, student_tokenizer=Untouched())
    message = [{"role": "user", "content": "1"}]
    with pytest.raises(RequestError):
        translate_body(
            {"messages": message, "student_messages": message, **fields},
            CHAT,
            replace(settings, vocabulary=vocabulary),
        )


def test_serving_to_others_needs_a_key():
    """Guards: an open server on every interface; temperatures silently not applied."""
    with pytest.raises(ConfigError, match="API key"):
        serve(ServeConfig(host="0.0.0.0"), {})
    with pytest.raises(ConfigError, match="temperature"):
        ServeConfig(mixture=MixtureConfig(temperature=0.5))
