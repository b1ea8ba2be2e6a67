"""Run folders of a tiny pair with a chat template that has a thinking mode, made without models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimal_sampling.config import (
    DataConfig,
    GenerateConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    Stage,
    VerifyConfig,
)
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.records import RunFolder
from optimal_sampling.records.export import ExportOptions, Tools
from optimal_sampling.records.run_folder import record_lines
from optimal_sampling.records.schema import Prompt, Sample, record_of, stage_id
from optimal_sampling.records.verdicts import Verdict, VerdictFile
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace, prompt_id
from optimal_sampling.vocabulary import ModelTokens, Vocabulary

TEMPLATE = """
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set reasoning, content = '', message.content -%}
{%- if '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
<|im_start|>assistant
{% if loop.last -%}
<think>
{{ reasoning }}
</think>

{% endif -%}
{{ content }}<|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""
"""As Qwen3's: reasoning is written again for the last turn, `enable_thinking=False` closes it."""

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("1", "2"), ("t", "h"), ("th", "e")]
END = "<|im_end|>"
QUESTION = "What is twelve plus one and then minus three now?"
"""The only question of every benchmark."""


def build_tokenizer(*, eos: str = END, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with three merges, so that ids of a text are not the only ones that read so.

    With `bos`, `<s>` is put before every text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(pair) for pair in MERGES)]
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d+|\s+|[^\s\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = [*SPECIALS, *(["<s>"] if bos else [])]
    backend.add_special_tokens([AddedToken(each, special=True) for each in specials])
    backend.add_tokens([AddedToken(each, special=False) for each in ("<think>", "</think>")])
    if bos:
        from tokenizers.processors import TemplateProcessing

        pair = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[pair])
    ends = {"eos_token": eos, "pad_token": SPECIALS[0]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    if bos:
        tokenizer.bos_token = "<s>"
    tokenizer.chat_template = ("<s>" if bos else "") + TEMPLATE
    return tokenizer


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """The vocabulary of a model with this tokenizer."""
    ends = frozenset(map(tokenizer.convert_tokens_to_ids, SPECIALS[::2]))
    tokens = ModelTokens("tiny", tokenizer, ends, rows=len(tokenizer))
    return Vocabulary.share(tokens, tokens)


@dataclass(frozen=True)
class Draw:
    """A completion to be recorded."""

    row: int
    text: str
    sample: int = 0
    verdict: Verdict | None = None
    reason: str = "stop"
    pieces: Sequence[str] = ()
    """Texts that are encoded on their own; empty: the whole text."""
    end: str = END
    stage: str = ""
    tries: int = 0
    log_p_student: float = -0.5


def top_of(ids: Sequence[int], k: int) -> dict[str, torch.Tensor]:
    """Top tokens of three distributions: at token i of the d-th the ids from i + d + the id on."""
    place = torch.arange(len(ids))[:, None, None] + torch.arange(3)[:, None] + torch.arange(k)
    first = torch.tensor(ids)[:, None, None]
    log_p = -0.25 * torch.arange(1, k + 1).expand(len(ids), 3, k)
    return {"top_ids": (first + place - place[:, :1, :1]).int(), "top_log_p": log_p.half()}


class Runs:
    """Makes run folders below a folder."""

    def __init__(self, root: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.root = root
        self.tokenizer = tokenizer or build_tokenizer()
        self.vocabulary = vocabulary_of(self.tokenizer)

    def make(
        self,
        draws: Sequence[Draw],
        rows: Sequence[dict[str, Any]],
        name: str = "run",
        *,
        mode: str = "mixture",
        seed: int = 7,
        failed: int = 0,
        top: int = 0,
        stages: tuple[Stage, ...] = (),
        **prompt: Any,
    ) -> str:
        """A run folder with the records of the draws, and their verdicts."""
        folder = self.root / name
        config = GenerateConfig(
            models=ModelConfig(student="tiny", teacher="tiny"),
            data=DataConfig(dataset="rows.jsonl"),
            prompt=PromptConfig(**prompt),
            run=RunConfig(output_dir=str(folder), mode=mode, seed=seed),
            verify=VerifyConfig(verify="synthetic"),
            stages=stages,
        )
        renderer = PromptRenderer(config.prompt, self.vocabulary)
        with RunFolder(config) as run:
            for draw in draws:
                run.add(record_of(self._sample(draw, rows[draw.row], renderer, mode, top)))
            for number in range(failed):
                request = Request(f"failed{number}", 0, 7, (), (), 8)
                completion = Completion.failed(request, "no prompt")
                run.add(record_of(Sample(Prompt(request.id, 99, {}), completion, "", 1, mode=mode)))
        self._grade(folder, draws)
        return str(folder)

    def _sample(
        self, draw: Draw, row: dict[str, Any], renderer: PromptRenderer, mode: str, top: int
    ) -> Sample:
        rendered = renderer.render(row)
        prompt = Prompt(
            id=prompt_id(rendered.student_text, rendered.teacher_text),
            row_index=draw.row,
            row=row,
            student_text=rendered.student_text,
            teacher_text=rendered.teacher_text,
            n_student_tokens=len(rendered.student_ids),
            n_teacher_tokens=len(rendered.teacher_ids),
        )
        ids = [
            index
            for piece in draw.pieces or [draw.text]
            for index in self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ]
        if draw.reason == "stop":
            ids.append(self.tokenizer.convert_tokens_to_ids(draw.end))
        values = dict.fromkeys(TRACE_FIELDS, 0.5) | {"log_p_student": draw.log_p_student}
        trace = TokenTrace.from_rows([tuple(values.values())] * len(ids))
        if draw.stage:
            prompt = replace(prompt, id=stage_id(draw.stage, prompt.id))
        request = Request(
            prompt.id, draw.sample, 7, rendered.student_ids, rendered.teacher_ids, 512
        )
        captured = top_of(ids, top) if top else {}
        completion = Completion(request, tuple(ids), draw.reason, trace, captured=captured)
        text, raw = self.vocabulary.decode(ids), self.vocabulary.decode_raw(ids)
        return Sample(prompt, completion, text, 1, raw, mode, stage=draw.stage, tries=draw.tries)

    def _grade(self, folder: Path, draws: Sequence[Draw]) -> None:
        verdicts = [draw.verdict for draw in draws]
        if not any(verdicts):
            return
        with VerdictFile(folder, "main") as file:
            for verdict, (_, line) in zip(verdicts, record_lines(folder), strict=False):
                record = line.record
                if verdict is not None:
                    file.append(
                        {
                            "id": record["id"],
                            "sample_index": record["sample_index"],
                            "verdict": verdict,
                            "answer": None,
                            "reference": None,
                            "grader": "test",
                            "record": line.checksum,
                            "detail": None,
                            "failed": False,
                        }
                    )

    @property
    def tools(self) -> Tools:
        """Of the tiny model; it scores -2 per token."""
        return Tools(
            vocabulary=lambda model, trust: self.vocabulary,
            rows_of=lambda name: [{"question": QUESTION}],
            score=lambda model, trust, pairs: (-2.0 * len(ids) for _, ids in pairs),
        )

    def options(self, *runs: str, **options: Any) -> ExportOptions:
        """Options with an output folder."""
        return ExportOptions(runs, **{"output_dir": str(self.root / "out"), **options})


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        {"problem": f"{n}+12=?", "answer": str(n + 12), "solution": f"it is {n + 12}"}
        for n in range(8)
    ]
