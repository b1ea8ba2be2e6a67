"""Train the two models of `optimal_sampling.toy_pair` from nothing, on a CPU.

    OMP_NUM_THREADS=2 python scripts/train_toy_pair.py

Teacher and student go to `src/optimal_sampling/toy_pair/{teacher,student}`, in bfloat16, and what
they can do to `report.json` beside them: about an hour for both. Needs the package, torch and
transformers. Deterministic by seed on one machine and number of threads. `--resume` goes on from
the last checkpoint.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import toy_training_data as training
from torch import Tensor
from toy_training_data import TRAINING_SEED, Style, build_number_tokenizer, build_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from optimal_sampling.toy_pair import problems
from optimal_sampling.toy_pair.problems import Problem

ROOT = Path(__file__).resolve().parents[1]
POOL = 4  # batches whose examples are sorted by length together, so that little padding is computed
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are an expert in mathematics.",
    "You are a simple and concise assistant.",
    "Solve the problem step by step.",
)
SUFFIXES = (
    "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "\nThink step by step.",
    "\nSolve it.",
    " ",
    "\n",
)


@dataclass(frozen=True)
class Recipe:
    """What one of the two models is, and how it is trained."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int  # rows of logits; may exceed the tokenizer's ids
    steps: int
    batch: int
    rate: float
    styles: dict[Style, float]
    short_until: int  # before this step: problems of one or two operations
    plain_until: int  # before this step: only style A, no hints, no other prompts
    build_tokenizer: Callable[[], PreTrainedTokenizerFast] = build_tokenizer
    mistaken: bool = False  # has the student's arithmetic


TEACHER = Recipe(
    name="teacher", layers=12, hidden=144, inner=384, heads=6, vocabulary=272,
    steps=2500, batch=48, rate=4e-3,
    styles={"A": 0.4, "B": 0.15, "C": 0.2, "D": 0.25}, short_until=400, plain_until=1000,
)  # fmt: skip
STUDENT = Recipe(
    name="student", layers=2, hidden=96, inner=288, heads=4, vocabulary=264,
    steps=4000, batch=48, rate=4e-3,
    styles={"A": 0.85, "B": 0.05, "C": 0.05, "D": 0.05}, short_until=300, plain_until=1000,
    mistaken=True,
)  # fmt: skip
NUMBER_STUDENT = replace(
    STUDENT, name="number-student", vocabulary=1264, steps=2000,
    build_tokenizer=build_number_tokenizer,
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in (TEACHER, STUDENT)}
OTHERS = {NUMBER_STUDENT.name: NUMBER_STUDENT}  # not of the pair, and not in its report
EVALUATION_SEED = 1_000_003


# ---------------------------------------------------------------- text


def student_belief(rng: random.Random) -> problems.Compute:
    """The student's arithmetic: it takes factors above 4 for one less, and slips now and then."""

    def compute(left: int, operator: str, right: int, index: int) -> int:
        result = problems.exact(left, operator, right)
        draw = rng.random()
        if operator == "*" and right > 4:
            return (
                result
                if draw < 0.08
                else left * (right - 1)
                if draw < 0.8
                else training.wrong(result, rng)
            )
        return training.wrong(result, rng) if draw < 0.1 else max(result, 0)

    return compute


def hint_of(problem: Problem, rng: random.Random) -> tuple[str, problems.Compute]:
    """A hint and the arithmetic that follows it. Most hints are wrong, often in many steps."""
    only_answer = rng.random() < 0.4
    compute = problems.exact
    if rng.random() < 0.6:
        last = problem.steps - 1
        mistaken = {step for step in range(problem.steps) if rng.random() < 0.5} | {
            rng.randint(0, last)
        }
        compute = training.wrong_at(problem, {last} if only_answer else mistaken, rng)
    hint = (
        str(problems.results(problem, compute)[-1][3])
        if only_answer
        else training.solve(problem, "A", compute)
    )
    return hint, compute


def conversation(user: str, system: str = "") -> str:
    """The prompt as the chat template writes it."""
    head = f"<|system|>{system}<|end|>" if system else ""
    return f"{head}<|user|>{user}<|end|><|assistant|>"


def example(recipe: Recipe, index: int, step: int) -> tuple[str, str]:
    """Prompt and target number `index`, as the curriculum has it at `step`."""
    rng = random.Random(f"example:{recipe.name}:{index}")
    steps = rng.randint(1, 2) if step < recipe.short_until else None
    problem = problems.make_problem(TRAINING_SEED, index, steps)
    compute = student_belief(rng) if recipe.mistaken else problems.exact
    if step < recipe.plain_until:
        return conversation(problem.text), training.solve(problem, "A", compute) + "<|end|>"
    user, system = problem.text, ""
    if recipe.name == "teacher" and rng.random() < 0.4:
        hint, compute = hint_of(problem, rng)
        user = training.hinted(user, hint)
    if rng.random() < 0.06:
        user += rng.choice(SUFFIXES)
    if rng.random() < 0.06:
        system = rng.choice(SYSTEM_PROMPTS)
    style = rng.choices(list(recipe.styles), list(recipe.styles.values()))[0]
    return conversation(user, system), training.solve(problem, style, compute) + "<|end|>"


def batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels from step `start` on; right-padded, so a causal model needs no mask."""
    for pool in range(start // POOL, recipe.steps // POOL + 1):
        first = pool * POOL * recipe.batch
        texts = [example(recipe, first + i, pool * POOL) for i in range(POOL * recipe.batch)]
        rows = sorted(
            ((encode(tokenizer, p), encode(tokenizer, t)) for p, t in texts),
            key=lambda r: sum(map(len, r)),
        )
        groups = [rows[i : i + recipe.batch] for i in range(0, len(rows), recipe.batch)]
        random.Random(pool).shuffle(groups)
        yield from map(collate, groups)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def collate(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Only the solution is learned."""
    width = max(len(prompt) + len(target) for prompt, target in rows)
    ids = torch.full((len(rows), width), 256)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, target) in enumerate(rows):
        ids[row, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels[row, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    return ids, labels


# ---------------------------------------------------------------- training


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates, for the matrices inside the layers (Jordan et al. 2024).

    Matrices of one shape are orthogonalised together, in float32: bfloat16 is slow on most CPUs.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        shapes = sorted({p.shape for p in parameters})
        super().__init__(
            [{"params": [p for p in parameters if p.shape == s]} for s in shapes], {"lr": lr}
        )
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Nesterov momentum, orthogonalised, and a little weight decay."""
        for group in self.param_groups:
            parameters = group["params"]
            gradient = torch.stack([p.grad for p in parameters])
            buffer = self.state[parameters[0]].setdefault("momentum", torch.zeros_like(gradient))
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(buffer, self.momentum))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5  # the size of an update of AdamW
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - 0.01 * group["lr"]).add_(change, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """All singular values brought near 1 by five Newton-Schulz iterations."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def make_optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "layers" not in name]
    adam = torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [adam, Muon(matrices, lr=recipe.rate)]


def rate_at(step: int, recipe: Recipe) -> float:
    """Warm up, stay, then fall to zero over the last 40%."""
    return recipe.rate * min(1.0, (step + 1) / 50, (recipe.steps - step) / (0.4 * recipe.steps))


def train(recipe: Recipe, work: Path, output: Path, resume: bool) -> float:
    """Train, saving often; returns the minutes it took in all."""
    tokenizer = recipe.build_tokenizer()
    model = build_model(recipe, tokenizer)
    average = build_model(recipe, tokenizer)  # of the weights over the last hundred steps or so
    average.load_state_dict(model.state_dict())
    optimizers = make_optimizers(model, recipe)
    checkpoint = work / f"{recipe.name}.pt"
    start, before = 0, 0.0
    if resume and checkpoint.exists():
        start, before = load_checkpoint(checkpoint, model, average, optimizers)
    began, smooth = time.perf_counter(), 0.0
    for step, (ids, labels) in enumerate(
        islice(batches(recipe, tokenizer, start), recipe.steps - start), start
    ):
        loss = train_step(model, optimizers, ids, labels, rate_at(step, recipe))
        follow(average, model, min(0.99, step / (step + 10)))
        smooth = loss if step == start else 0.95 * smooth + 0.05 * loss
        minutes = (time.perf_counter() - began) / 60
        if step % 25 == 24:
            left = minutes / (step + 1 - start) * (recipe.steps - step - 1)
            print(
                f"{recipe.name} {step + 1}/{recipe.steps} loss {smooth:.4f} "
                f"{minutes:.1f} min, {left:.1f} left",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            save_checkpoint(checkpoint, model, average, optimizers, step + 1, before + minutes)
            save_model(average, tokenizer, output / recipe.name)
    return before + (time.perf_counter() - began) / 60


def train_step(
    model: Qwen3ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    ids: Tensor,
    labels: Tensor,
    rate: float,
) -> float:
    # Divided by a constant: a mean would give less weight to the tokens of longer batches, so to
    # longer styles.
    loss = model(
        input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=50 * len(ids)
    ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def follow(average: Qwen3ForCausalLM, model: Qwen3ForCausalLM, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(path, model, average, optimizers, step: int, minutes: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "minutes": minutes,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_checkpoint(path, model, average, optimizers) -> tuple[int, float]:
    state = torch.load(path)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["minutes"]


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """In bfloat16. Every file is replaced whole, so a reader never sees half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        copy = Qwen3ForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        copy.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.chmod(0o644)
            os.replace(file, folder / file.name)


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    greedy: bool = False,
) -> list[list[int]]:
    """Completions as token ids, the end token included where one came."""
    completions: list[list[int]] = []
    options = (
        {"do_sample": False}
        if greedy
        else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )
    for first in range(0, len(prompts), 250):
        rows = [encode(tokenizer, prompt) for prompt in prompts[first : first + 250]]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=220, **options)[
            :, width:
        ].tolist()
        end = tokenizer.eos_token_id
        completions += [row[: row.index(end) + 1] if end in row else row for row in out]
    return completions


@torch.no_grad()
def overlap(
    one: Qwen3ForCausalLM, other: Qwen3ForCausalLM, rows: list[tuple[list[int], list[int]]]
) -> dict:
    """Mean total variation between two models over tokens of completions, on common ids."""
    distances = []
    ids_in_common = min(one.config.vocab_size, other.config.vocab_size)
    for first in range(0, len(rows), 100):
        ids, labels = collate(rows[first : first + 100])
        p, q = ((m(input_ids=ids).logits[:, :-1, :ids_in_common]).softmax(-1) for m in (one, other))
        distances.append((0.5 * (p - q).abs().sum(-1))[labels[:, 1:] >= 0])
    distance = torch.cat(distances)
    return {
        "tv": round(distance.mean().item(), 4),
        "1-tv": round(1 - distance.mean().item(), 4),
        "share of tokens with tv > 0.02": round((distance > 0.02).float().mean().item(), 4),
        "tokens": distance.numel(),
    }


@torch.no_grad()
def milliseconds_per_token(model: Qwen3ForCausalLM) -> float:
    """Median time of a cached one-token forward at batch 1."""
    cache = model(input_ids=torch.full((1, 32), 48), use_cache=True).past_key_values
    times = []
    for _ in range(150):
        began = time.perf_counter()
        model(input_ids=torch.full((1, 1), 48), past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - began)
    return 1000 * sorted(times)[len(times) // 2]


def share(hits: list[bool]) -> dict[str, float]:
    """A share and its standard error."""
    p = sum(hits) / max(len(hits), 1)
    return {
        "share": round(p, 4),
        "standard_error": round((p * (1 - p) / max(len(hits), 1)) ** 0.5, 4),
        "n": len(hits),
    }


def style_of(text: str) -> str:
    """Which style a completion is in; the terse ones of a single step count as A."""
    parts = text.replace(".", ";").split(";")[0].split("=")
    if "=(" in text:
        return "C"
    if sum(parts[0].count(op) for op in "+-*") > 1:
        return "D"
    return "B" if len(parts) > 2 else "A"


def grade(questions: list[Problem], texts: list[str]) -> dict:
    hits = [
        problems.is_correct(text, problem.answer)
        for problem, text in zip(questions, texts, strict=True)
    ]
    lengths = range(1, problems.MAX_STEPS + 1)
    styles = [style_of(text) for text in texts]
    return {
        "correct": share(hits),
        "ended": share([text.endswith("<|end|>") for text in texts]),
        "by steps": {
            n: share([h for h, p in zip(hits, questions, strict=True) if p.steps == n])["share"]
            for n in lengths
        },
        "styles": {s: share([s == t for t in styles])["share"] for s in training.STYLES},
        "correct by style": {
            s: share([h for h, t in zip(hits, styles, strict=True) if s == t])["share"]
            for s in training.STYLES
        },
    }


def hints(questions: list[Problem]) -> dict[str, list[str]]:
    """Right and wrong hints for every problem."""
    rng = random.Random(0)
    mistakes = [training.wrong_at(p, {rng.randrange(p.steps)}, rng) for p in questions]
    return {
        "right answer": [p.answer for p in questions],
        "right solution": [p.solution for p in questions],
        "wrong answer": [str(training.wrong(int(p.answer), rng)) for p in questions],
        "wrong solution": [
            training.solve(p, "A", mistake) for p, mistake in zip(questions, mistakes, strict=True)
        ],
    }


def measure(output: Path, n: int) -> dict:
    """All of the report, on problems that were not trained on, with the weights as shipped."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    models = {
        name: Qwen3ForCausalLM.from_pretrained(output / name, dtype=torch.float32).eval()
        for name in RECIPES
    }
    questions = [problems.make_problem(EVALUATION_SEED, i) for i in range(n)]
    plain = [conversation(p.text) for p in questions]
    report: dict = {"problems": n, "seed": EVALUATION_SEED}
    drawn = {}
    for name, model in models.items():
        drawn[name] = sample(model, tokenizer, plain)
        report[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "temperature 1": grade(questions, tokenizer.batch_decode(drawn[name])),
            "greedy": grade(
                questions, tokenizer.batch_decode(sample(model, tokenizer, plain, greedy=True))
            ),
            "mean tokens": sum(map(len, drawn[name])) / n,
        }
        print(name, json.dumps(report[name]), flush=True)
    for kind, texts in hints(questions).items():
        prompts = [
            conversation(training.hinted(p.text, hint))
            for p, hint in zip(questions, texts, strict=True)
        ]
        told = tokenizer.batch_decode(sample(models["teacher"], tokenizer, prompts))
        report["teacher"][f"{kind} as hint"] = grade(questions, told) | {
            "same answer as the hint": share(
                [
                    problems.is_correct(t, problems.boxed(h) or h)
                    for t, h in zip(told, texts, strict=True)
                ]
            )
        }
        print(kind, json.dumps(report["teacher"][f"{kind} as hint"]), flush=True)
    for name, ids in drawn.items():
        rows = [(encode(tokenizer, prompt), row) for prompt, row in zip(plain, ids, strict=True)]
        report[f"teacher against student along {name} samples"] = overlap(
            models["teacher"], models["student"], rows
        )
    cost = {name: round(milliseconds_per_token(model), 3) for name, model in models.items()}
    report["cost"] = cost | {
        "unit": "ms per one-token forward",
        "ratio": round(cost["teacher"] / cost["student"], 2),
    }
    report["megabytes"] = round(
        sum(f.stat().st_size for m in models for f in (output / m).iterdir()) / 1e6, 3
    )
    return report


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "src/optimal_sampling/toy_pair",
        help="folder of both models",
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/toy_pair", help="folder of the checkpoints"
    )
    parser.add_argument(
        "--only", choices=(*RECIPES, *OTHERS), help="train one; `number-student` is not of the pair"
    )
    parser.add_argument(
        "--steps", type=int, help="train for fewer or more steps than the recipe says"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--problems", type=int, default=1000, help="how many to measure on")
    parser.add_argument("--measure-only", action="store_true", help="train nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # sure models make tiny gradients, and those are slow
    torch.use_deterministic_algorithms(True)
    if options.only in OTHERS:
        other = OTHERS[options.only]
        train(
            replace(other, steps=options.steps or other.steps),
            options.work,
            options.output,
            options.resume,
        )
        return
    report = options.output / "report.json"
    earlier = json.loads(report.read_text()) if report.exists() else {}
    minutes = earlier.get("training minutes", {})
    for recipe in RECIPES.values():
        if not options.measure_only and options.only in (None, recipe.name):
            recipe = replace(recipe, steps=options.steps or recipe.steps)
            minutes[recipe.name] = round(
                train(recipe, options.work, options.output, options.resume), 1
            )
    made_by = {
        "training minutes": minutes,
        "training threads": options.threads,
        "torch": torch.__version__,
    }
    made_by = earlier if options.measure_only else made_by
    report.write_text(
        json.dumps(made_by | measure(options.output, options.problems), indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
