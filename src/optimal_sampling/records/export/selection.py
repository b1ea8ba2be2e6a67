"""Which records become rows: filters and preferences, in a fixed order, each with its count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from optimal_sampling.errors import DatasetError, RunFolderError
from optimal_sampling.records.export.options import ExportOptions
from optimal_sampling.records.export.reading import Entry

__all__ = ["Selection", "is_validation", "select"]


@dataclass
class Selection:
    """The entries that are exported, and how many each step left out."""

    entries: list[Entry]
    left_out: dict[str, int] = field(default_factory=dict)
    """By reason, in the order of the steps; steps that were not asked for are absent."""

    def keep(self, reason: str, is_kept: Callable[[Entry], bool]) -> None:
        """Leave out the entries that are not kept, and count them."""
        kept = [entry for entry in self.entries if is_kept(entry)]
        self.left_out[reason] = len(self.entries) - len(kept)
        self.entries = kept


def select(
    entries: list[Entry], options: ExportOptions, contaminated: dict[bytes, str]
) -> Selection:
    """Apply the filters and preferences of an export.

    `contaminated`: by prompt, the benchmark that it overlaps with. Raises RunFolderError where
    records lack what the options ask for, DatasetError where nothing is left.
    """
    selection = Selection(list(entries))
    if options.draws:
        _filter_completions(selection, options)
    for benchmark in options.decontaminate:
        _drop_overlaps(selection, benchmark, contaminated)
    if options.dedup and options.draws:
        kept = {id(each) for each in _first_of_each(selection.entries)}
        selection.keep("equal completions of a prompt", lambda each: id(each) in kept)
    most = options.max_per_prompt if options.draws else 1
    if most is not None:
        kept = {id(each) for each in _preferred(selection.entries, most, options)}
        reason = f"more than {most} of a prompt" if options.draws else "further samples of a prompt"
        selection.keep(reason, lambda each: id(each) in kept)
    if not selection.entries:
        raise DatasetError(_empty_message(len(entries), selection))
    return selection


def _filter_completions(selection: Selection, options: ExportOptions) -> None:
    if options.drop_truncated:
        selection.keep("truncated", lambda each: not each.truncated)

    def is_free(entry: Entry) -> bool:
        """Whether it is kept whatever its verdict: of stages only what ended them is."""
        return options.only == "all" or (options.only is None and not entry.tries)

    judged = [each.verdict for each in selection.entries if not is_free(each)]
    if not judged:
        return
    if all(verdict is None for verdict in judged):
        raise RunFolderError(
            "--only correct: the runs hold no verdicts on their records; grade them first with "
            f"`optimal-sampling verify {' '.join(options.runs)}`"
        )
    selection.keep("not graded", lambda each: is_free(each) or each.verdict is not None)
    usable = "without usable reference"
    selection.keep(usable, lambda each: is_free(each) or each.verdict != "skipped")
    selection.keep("not correct", lambda each: is_free(each) or each.verdict == "correct")


def _drop_overlaps(selection: Selection, benchmark: str, contaminated: dict[bytes, str]) -> None:
    selection.keep(
        f"overlapping with {benchmark}", lambda each: contaminated.get(each.prompt) != benchmark
    )


def _first_of_each(entries: list[Entry]) -> Iterator[Entry]:
    seen: set[tuple[bytes, bytes]] = set()
    for entry in entries:
        content = entry.prompt, entry.completion
        if content not in seen:
            seen.add(content)
            yield entry


def _preferred(entries: list[Entry], most: int, options: ExportOptions) -> Iterator[Entry]:
    """The `most` best entries of every prompt; of equal ones the first drawn."""
    by_prompt: dict[bytes, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_prompt[entry.prompt].append(entry)
    rank = _RANKS[options.prefer] if options.draws else _RANKS["first"]
    for group in by_prompt.values():
        yield from sorted(group, key=rank)[:most]


def _likeliest(entry: Entry) -> float:
    if entry.log_p_student is None:
        raise RunFolderError(
            f"--prefer on-policy: {entry.file} holds records without log_p_student (they are of an "
            "older version, or of the teacher alone); choose another preference"
        )
    return -entry.log_p_student


_RANKS: dict[str, Callable[[Entry], float]] = {
    "first": lambda entry: entry.tries or entry.key[1],
    "shortest": lambda entry: entry.tokens,
    "on-policy": _likeliest,
}


def _empty_message(count: int, selection: Selection) -> str:
    steps = "; ".join(f"{number} {reason}" for reason, number in selection.left_out.items())
    return f"nothing to export: of {count} good records were left out: {steps or 'none'}"


def is_validation(prompt: bytes, share: float) -> bool:
    """Whether the rows of a prompt go to the validation split: a function of the prompt alone."""
    return int.from_bytes(prompt[:8], "little") < share * 2**64
