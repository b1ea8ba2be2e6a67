"""Top tokens of the local engine against the logits that it drew from."""

from __future__ import annotations

import pytest
import torch

from optimal_sampling.config import MixtureConfig
from tests.engines.conformance import Harness, requests_of
from tests.engines.local.conftest import CONTEXT, engine_of, tiny_model

PROMPTS = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), ([7, 8], [7, 8])]
CAPTURE = frozenset({"student_logits", "teacher_logits", "log_q"})
MIXTURES = {
    "plain": MixtureConfig(temperature=0.5),
    "teacher support": MixtureConfig(teacher_support_top_k=4),
    "veto": MixtureConfig(alpha_method="veto"),
    "no alpha": MixtureConfig(alpha_method="interleaved", interleaved_top_k=3),
}


@pytest.fixture(scope="module")
def models():
    return tiny_model(1, layers=1), tiny_model(2, layers=3)


def requests():
    return requests_of(Harness(None, None, PROMPTS, CONTEXT), 4, new=6)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_top_tokens_are_those_of_the_logits(models, mixture, drafts):
    """Guards: rows of a rejected draft, of another sequence, or of the token after."""
    engine = engine_of(*models, batch_size=3, top_tokens=5, draft_tokens=drafts)
    plain = engine_of(*models, batch_size=3, draft_tokens=drafts).view(mixture)
    without = {c.request.key: c.token_ids for c in plain.generate(requests())}
    done = list(engine.view(mixture, capture=CAPTURE).generate(requests()))
    assert len(done) == len(without) > 0
    for c in done:
        assert c.token_ids == without[c.request.key]
        ids, log_p = c.captured["top_ids"], c.captured["top_log_p"].float()
        assert ids.shape == log_p.shape == (len(c.token_ids), 3, 5)
        models_log_p = [
            (c.captured[f"{role}_logits"] / mixture.temperature).log_softmax(-1)
            for role in ("student", "teacher")
        ]
        for place, full in enumerate([*models_log_p, c.captured["log_q"]]):
            expected = full.topk(5).values
            torch.testing.assert_close(log_p[:, place], expected, atol=4e-3, rtol=1e-3)
            known = expected.isfinite()
            picked = full.gather(1, ids[:, place].long())
            torch.testing.assert_close(picked[known], expected[known], atol=1e-5, rtol=1e-5)


def test_one_model_alone(models):
    """Guards: top tokens of a model that was not run."""
    engine = engine_of(*models, top_tokens=4).view(mode="student")
    for c in engine.generate(requests()):
        assert c.captured["top_ids"].shape == (len(c.token_ids), 1, 4)
        assert c.captured["top_log_p"].dtype == torch.float16
