"""Hub ids where no request can reach the hub."""

import socket

import huggingface_hub
import pytest

from optimal_sampling.errors import ModelError
from optimal_sampling.vocabulary import hub_problem, load_tokens


@pytest.fixture
def resolver(monkeypatch):
    """A name server whose answers are a list: errors of getaddrinfo, or None for a host."""
    asked = []

    def answer(*codes):
        left = list(codes)

        def getaddrinfo(host, port):
            asked.append(host)
            if (code := left.pop(0)) is not None:
                raise socket.gaierror(code, "as given")
            return [()]

        monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
        return asked

    for name in ("http_proxy", "https_proxy", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return answer


@pytest.mark.parametrize(
    ("codes", "is_reached"),
    [
        ((socket.EAI_NONAME, socket.EAI_NONAME), False),
        ((None,), True),
        ((socket.EAI_NONAME, None), True),
        ((socket.EAI_AGAIN,), True),  # the hub's client tries again
    ],
)
def test_only_a_host_that_does_not_exist_is_out_of_reach(resolver, codes, is_reached):
    """Guards: retries that are cut off on a machine with a network."""
    asked = resolver(*codes)
    problem = hub_problem(pause=0)
    assert (problem == "") == is_reached
    assert asked == ["huggingface.co"] * len(codes)
    assert is_reached or "finds no host huggingface.co" in problem


def test_another_endpoint_and_a_proxy(resolver, monkeypatch):
    """Guards: a mirror that is judged by the hub's own name, and a proxy that looks names up."""
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:8080/hub")
    assert resolver(socket.EAI_NONAME, socket.EAI_NONAME) == []
    assert "finds no host mirror.example" in hub_problem(pause=0)
    asked = resolver()
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    before = len(asked)
    assert hub_problem(pause=0) == ""
    assert len(asked) == before


def test_a_mistyped_hub_id_fails_at_once_without_a_network(monkeypatch):
    """Guards: half a minute of retries of a machine without a network."""
    monkeypatch.setattr("optimal_sampling.vocabulary.tokens.hub_problem", lambda: "no host h")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match=r"no folder .*some/modle.*downloaded before, and no host"):
        load_tokens("some/modle")


def test_a_model_that_was_downloaded_needs_no_network(monkeypatch):
    """Guards: a cached model that is refused offline."""

    def found(name, file, revision=None):
        return f"/cache/{name}/{file}"

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
    monkeypatch.setattr("optimal_sampling.vocabulary.tokens.hub_problem", lambda: "no host h")

    def reached(*_, **__):
        raise OSError("the cache was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", reached)
    with pytest.raises(ModelError, match="the cache was asked"):
        load_tokens("some/model")
