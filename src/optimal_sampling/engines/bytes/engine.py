"""`ByteEngine`: two Transformers models with different tokenizers in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from optimal_sampling.config import EngineOptions, LocalOptions, MixtureConfig
from optimal_sampling.engines.bytes.contexts import ByteModel, ContextRows, PassCounts
from optimal_sampling.engines.bytes.drafting import ByteDrafter, MeasuredChoice
from optimal_sampling.engines.bytes.laws import LawReader
from optimal_sampling.engines.bytes.mixing import SymbolMixer
from optimal_sampling.engines.bytes.options import check_byte_options
from optimal_sampling.engines.bytes.row import RowSettings
from optimal_sampling.engines.bytes.run import ByteLoop
from optimal_sampling.engines.bytes.text import TokenizedText
from optimal_sampling.engines.bytes.trie import ByteTrie
from optimal_sampling.engines.local.engine import LoadedPair, LocalEngine
from optimal_sampling.engines.local.round import RunSettings
from optimal_sampling.errors import EngineError, ModelError
from optimal_sampling.types import Completion, Mode, Request
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["ByteEngine"]

AUTO_DRAFTS, AUTO_RATIO = 4, 4
"""`draft_tokens auto`: so many, where the teacher has so many times the student's parameters and as
long as they cost less than none."""


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class ByteEngine(LocalEngine):
    """Student and teacher seen as models of bytes; completions in the student's tokens.

    Requests, memory and options are those of the local engine. `counts` holds what each model
    computed in the latest `generate` call.
    """

    captures = frozenset()
    loop_class: ClassVar[type[ByteLoop]] = ByteLoop

    def __init__(
        self,
        pair: LoadedPair,
        mixture: MixtureConfig,
        options: LocalOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
    ) -> None:
        super().__init__(pair, mixture, options, vocabulary, mode)
        self.tries = {role: ByteTrie(t.of_id) for role, t in vocabulary.bytes_by_role.items()}
        self.counts: dict[str, PassCounts] = {}
        self._loop: ByteLoop | None = None
        self._check_settings(options)

    def _check_settings(self, loaded: EngineOptions) -> None:
        """As in `LocalEngine`. Raises ConfigError too for options that tokens have and bytes not,
        ModelError for a model that cannot forget tokens.
        """
        super()._check_settings(loaded)
        check_byte_options(self.mixture, self.options, self.mode)
        for role in self.roles:
            runner = self.pair.runners.get(role)
            if runner is not None and not runner.drafts:
                raise ModelError(
                    f"the {role} model runs with its own cache, which cannot take tokens back, as "
                    "byte-level mixing does: take a model that the local engine runs over slots or "
                    "pages"
                )

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """As in `Engine`."""
        if not self.pair.runners:
            raise EngineError("this engine was closed; open another one")
        loop = self._loop = self.open_loop()
        self.counts = {role: model.contexts.counts for role, model in loop.models.items()}
        try:
            yield from loop.completions(requests)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory on {self.device}: "
                f"use a smaller batch_size or kv_memory_gib ({error})"
            ) from error
        finally:
            loop.close()

    @property
    def rounds(self) -> int:
        """As in `Engine`."""
        return self._loop.rounds if self._loop is not None else 0

    def open_loop(self) -> ByteLoop:
        """The loop of one `generate` call, with empty caches."""
        settings = self._settings()
        limits = settings.limits
        models = {
            role: ByteModel(
                contexts=rows,
                laws=LawReader(
                    self.vocabulary.bytes_by_role[role],
                    self.tries[role],
                    self.mixture,
                    role,
                    self.mode,
                ),
            )
            for role, rows in self._context_rows(settings).items()
        }
        rows = RowSettings(
            roles=self.roles,
            tries=self.tries,
            contexts=dict(zip(self.roles, limits.context_lengths, strict=True)),
            texts=self._texts(),
            end_id=min(self.stop_ids),
            tolerance=self.options.byte_tolerance,
            force_first_token=self.mixture.force_first_token and self.mode == "mixture",
        )
        mixer = SymbolMixer(self.mixture, self.mode)
        loop = self.loop_class(models, rows, mixer, settings)
        count = self._drafts_per_round()
        if count:
            loop.drafter = ByteDrafter(models, mixer, rows.texts["teacher"], rows.contexts, count)
        if self.options.draft_tokens == "auto":
            loop.choice = MeasuredChoice()
        return loop

    def _texts(self) -> dict[str, TokenizedText]:
        tokenizers = {
            "student": self.vocabulary.student_tokenizer,
            "teacher": self.vocabulary.teacher_tokenizer,
        }
        tables = self.vocabulary.bytes_by_role
        return {role: TokenizedText(tokenizers[role], tables[role]) for role in tokenizers}

    def _drafts_per_round(self) -> int:
        """`auto`: some, where a pass of the teacher costs several of the student's."""
        if self.mode != "mixture":
            return 0
        if self.options.draft_tokens != "auto":
            return self.options.draft_tokens
        sizes = {role: _parameters(self.pair.runners[role].model) for role in self.roles}
        return AUTO_DRAFTS if sizes["teacher"] >= AUTO_RATIO * sizes["student"] else 0

    def _context_rows(self, settings: RunSettings) -> dict[str, ContextRows]:
        """The models that take part, with caches of as many tokens each."""
        runners = {role: self.pair.runners[role] for role in self.roles}
        for runner in set(self.pair.runners.values()) - set(runners.values()):
            runner.drop_caches()
        per_token = sum(runner.bytes_per_token for runner in runners.values())
        tokens = settings.memory // max(1, per_token)
        limits = settings.limits
        return {
            role: ContextRows(runner, index, tokens, limits.rows, limits.prefill_chunk)
            for index, (role, runner) in enumerate(runners.items())
        }

    @property
    def drafted(self) -> int:
        """Symbols that were drafted in the latest run."""
        drafter = self._loop.drafter if self._loop is not None else None
        return drafter.drafted if drafter is not None else 0

    @property
    def accepted(self) -> int:
        """Of these, symbols that were drawn."""
        return self._loop.accepted if self._loop is not None else 0

    @property
    def symbols(self) -> int:
        """Bytes and ends that were drawn in the latest run."""
        return self._loop.symbols if self._loop is not None else 0

    def notes(self) -> dict[str, str]:
        """As in `LocalEngine`, and the forward passes of the latest run."""
        notes = super().notes()
        notes["granularity"] = "byte"
        if self.pair.shared:
            notes["weights"] = "the same for student and teacher, loaded once"
        for role, counts in self.counts.items():
            if counts.passes:
                notes[f"{role}_passes"] = (
                    f"{counts.passes}, for {counts.contexts} contexts of tokens"
                )
        if self.drafted:
            notes["drafts"] = f"{self.accepted} of {self.drafted} drafted bytes accepted"
        return notes
