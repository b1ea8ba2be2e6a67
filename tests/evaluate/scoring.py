"""Scores made of plain lists, for the tests of statistics and tables."""

from optimal_sampling.evaluate.statistics import CheckpointScores, Sample

VERDICTS = {"R": "correct", "T": "truncated", "-": "no_answer", "S": "skipped"}
VERDICTS |= {"!": "correct", "?": "wrong"}
"""Letters of `scores_of`; other letters are wrong answers. The answers of `!` and `?` were not
extracted."""


def samples_of(*questions: str) -> list[Sample]:
    """One question per text, one letter per sample: `"RRA-"` is right twice, A, no answer."""
    return [
        Sample(
            question=f"question {number}",
            sample_index=index,
            verdict=VERDICTS.get(letter, "wrong"),
            answer=None if letter in "T-S!?" else letter,
            tokens=10 * number + index,
            hedging=index / 10,
        )
        for number, letters in enumerate(questions)
        for index, letter in enumerate(letters)
    ]


def scores_of(*questions: str) -> CheckpointScores:
    return CheckpointScores.from_samples(samples_of(*questions))
