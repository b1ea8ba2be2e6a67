"""The sentences of the report."""

from __future__ import annotations

from benchmarks.experiment.analysis import Results

__all__ = [
    "COST",
    "DIFFERENCES",
    "DIFFICULTY",
    "LIMITS",
    "NOT_JUDGED",
    "introduction",
    "measured",
    "verdict",
]

NOT_JUDGED = """\
The criteria of the plan cannot be applied yet: their arms do not have the results of all main
seeds on every pair.
"""

DIFFERENCES = """\
Points, paired by problem and by seed, with 95% intervals: to the default of `generate`
({default}), and to the teacher's text that was drawn as sharply.
"""

DIFFICULTY = """\
Accuracy at T = 1 by the number of steps of a problem (1 to 5), and by the pass rate of the student
before training on it.
"""

COST = """\
Problems: how many were tried until there was enough right text. Coverage: those with a right
completion, also by how many of the student's own four tries at the problem are right. Tokens: those
drawn from each model (in brackets up to the first right try, where drawing could have stopped);
rejected drafts and prompts are not counted. Seconds are of one thread, and depend on the machine.
"""

LIMITS = """\
## What this does not show

- One student, two teachers of one family, arithmetic of one to five steps, a vocabulary of bytes.
  Nothing here was measured on a language model that people use.
- Seeds vary the slice of the problems, the draws and the order of training. The two teachers and
  the student were trained once: the intervals are not for other models.
- The arms and the criteria were fixed before these runs, but after an exploratory study of the same
  student and similar teachers (about 45 arms, 3 seeds, other problems), whose best arms were chosen
  to be looked at again. Treat the best of a group as a group.
- Several candidates are judged, and no interval is corrected for that.
- One learning rate, chosen on three kinds of text, holds for all; another may suit another text.
- Only right completions are trained on. Without a verifier, rules that make fewer errors gain more.
- 25,000 tokens and three epochs. What is sharp and alike may be worse where training goes on
  longer; pass@k and the number of distinct right texts are the only looks at diversity.
"""


def introduction(results: Results) -> str:
    """What was done, in a paragraph."""
    plan = results.plan
    seeds = sorted({each["seed"] for each in results.document["units"] if each["arm"] != "base"})
    tokens, epochs = plan.text["tokens"], plan.sft["epochs"]
    ways = {each["arm"] for each in results.document["units"]} - {"base"}
    problems, samples = len(results.document["steps"]), plan.evaluation["samples"]
    return f"""\
# Which text makes the best student?

Text was drawn in {len(ways)} ways, right completions were kept, the student was trained on
{tokens:,} of their tokens for {epochs} epochs, and asked {problems} problems that are in no
training text: {samples} completions each at T = 1, and the greedy one.
{len(results.document["units"])} trainings and evaluations, seeds {", ".join(map(str, seeds))}.
Arms, seeds, settings and criteria are in `benchmarks/experiment/plan.yaml` (hash
{plan.digest}), which was fixed before the first of these texts was drawn. Accuracies in percent.
"""


def verdict(results: Results, confirmed: list[str]) -> str:
    """The criteria, and what they confirm."""
    found = ", ".join(confirmed) if confirmed else "none of the candidates"
    return f"""\
## What is confirmed

A recommendation needs the lower end of the paired {results.plan.criteria["level"]:.0%} interval
above 0 on every pair, in accuracy at T = 1, against the default (KL symmetry [.5, 1] at T = 1) and
against the teacher's text drawn as sharply. Confirmed: **{found}**.
"""


def measured(results: Results, trials: str) -> str:
    """Machine, settings, commands, intervals."""
    plan, document = results.plan, results.document
    machines = {tuple(sorted(each["hardware"].items())) for each in document["units"]}
    lines = "\n".join(
        "- " + ", ".join(f"{name} {value}" for name, value in machine if value)
        for machine in sorted(machines, key=str)
    )
    teachers = "".join(
        f"- {name}: trained on {each['examples']} solutions in {each['seconds']:.0f} s "
        f"({each['cpu_seconds']:.0f} s of CPU time, their measuring included), "
        f"{each['megabytes']} MB in float32; of its solutions of the validation problems at T = 1 "
        f"{each['right']:.1%} are right, {each['as_trained']:.1%} word for word as those\n"
        for name, each in sorted(document["teachers"].items())
    )
    sft = plan.sft
    return f"""\
## How it was measured

    make experiment         # the main arms; goes on where it was stopped
    make experiment-full    # all arms, and more seeds of the main ones

Two arms with other seeds, and whether they lie within the intervals above; a pair and a dataset of
your own (`--plan` takes a copy of the plan with other budgets and prompts):

    python -m benchmarks.experiment run --arms teacher_greedy,veto_greedy --seeds 7,8 --output OUT
    python -m benchmarks.experiment compare --output OUT
    python -m benchmarks.experiment run --teacher TEACHER --student STUDENT --dataset FILE \\
        --plan MY_PLAN.yaml --output OUT

Machine:

{lines}

Training: AdamW, learning rate {sft["learning_rate"]:g} falling linearly, batches of
{sft["batch"]} completions, loss on the completions. Completions of at most
{plan.text["max_new_tokens"]} tokens, the first right one of each problem, in the order of the
problems, up to the tokens of the plan. All arms of a seed start from the same problems.

Intervals are for new problems and new seeds: the variance is the sum of that between the means of
the problems and that between the means of the seeds, each with its degrees of freedom
(`benchmarks/experiment/analysis.py`). With one seed they are for new problems alone.

The shipped pair is described in `src/optimal_sampling/toy_pair/README.md`: 2.9M and 0.27M
parameters, 6.4 MB. Teachers that were trained for this (`run` trains them on one thread where they
are missing, and the same weights on the same kind of machine):

{teachers or "- none" + chr(10)}
The learning rate was chosen on {plan.problems["validation"]["count"]} other problems, with texts of
other problems, by the mean of both accuracies over three kinds of text
(`python -m benchmarks.experiment tune`):

{trials}"""
