"""The common suite on vLLM: lockstep, drafts, the same weights twice, padded vocabularies."""

import contextlib
from dataclasses import replace

import pytest

from tests.engines.conformance import EngineConformance, Harness
from tests.engines.vllm.tiny import CONTEXT, PROMPTS, SECOND_RUNNER, Pair


def harness_of(pair, draft_tokens=0, **settings):
    base = pair.open(draft_tokens, **settings)
    harness = Harness(
        open=lambda mixture, batch_size: base.view(
            mixture, options=replace(base.options, batch_size=batch_size)
        ),
        logits=pair.logits,
        prompts=PROMPTS,
        context_length=CONTEXT,
        samples=1000 if SECOND_RUNNER else 3000,  # an interpreted step takes a second or more
    )
    harness.base = base
    return harness


class TestLockstep(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, folders):
        harness = harness_of(Pair(folders["student"], folders["teacher"]))
        yield harness
        harness.base.close()


class TestPaddedTeacher(EngineConformance):
    """Guards: tokens that only one model has, where the teacher has more rows of logits."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, folders):
        harness = harness_of(Pair(folders["student"], folders["padded"]))
        yield harness
        harness.base.close()


class TestSharedWeights(EngineConformance):
    """The same weights in both roles, different prompts."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, folders):
        harness = harness_of(
            Pair(folders["teacher"], folders["teacher"]), max_num_batched_tokens=256
        )
        yield harness
        harness.base.close()


unseeded = pytest.mark.skipif(
    not SECOND_RUNNER, reason="vLLM's first runner does not seed its accept-reject draws"
)


class Drafted(EngineConformance):
    """Drafts: lossless. On the first runner, what is a function of the seed is not asked."""

    drafts = 1

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, folders, request):
        harness = harness_of(Pair(folders["student"], folders["teacher"]), request.cls.drafts)
        yield harness
        harness.base.close()

    @unseeded
    def test_tokens_do_not_depend_on_the_batch(self, harness):
        """As in the common suite."""
        super().test_tokens_do_not_depend_on_the_batch(harness)

    @unseeded
    def test_samples_and_seeds_differ(self, harness):
        """As in the common suite."""
        super().test_samples_and_seeds_differ(harness)


class TestOneDraft(Drafted):
    drafts = 1


class TestThreeDrafts(Drafted):
    drafts = 3


class TestDraftsOfAPaddedPair(Drafted):
    """Guards: vLLM's demand for equally many rows; drafts of ids that one model does not have."""

    drafts = 2

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, folders):
        harness = harness_of(Pair(folders["student"], folders["padded"]), 2)
        yield harness
        harness.base.close()


def test_drafts_of_a_padded_student(folders):
    """The other way round: surplus rows of the student are never proposed.

    Drafts in every other size of the batch: none may be judged by those of an earlier step.
    """
    harness = harness_of(Pair(folders["padded"], folders["teacher"]), 2)
    with contextlib.closing(harness.base):
        scheduler = harness.base.core.engine_core.engine_core.scheduler
        scheduler.dynamic_sd_lookup = [2 * (size % 2) for size in range(257)]
        EngineConformance().test_draws_follow_q(harness)
        EngineConformance().test_each_model_sees_its_own_prompt(harness)
