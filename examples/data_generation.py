"""Write training data: the teacher sees the reference answer, the student does not.

For whole datasets use the command `optimal-sampling generate`, which resumes and shards.
Runs on a CPU.
"""

import json
import sys
from pathlib import Path

import torch

from optimal_sampling import OptimalSamplingModel

PROBLEMS = [
    ("61*8=?", "488"),
    ("87*2+74=?", "248"),
    ("82+97+14-69=?", "124"),
    ("11*4+46+54+11=?", "155"),
]


def main(path: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with OptimalSamplingModel(
        "toy-student", "toy-teacher", device=device, enable_chat_template=True
    ) as model:
        outputs = model.generate(
            prompts=[problem for problem, _ in PROBLEMS],
            prompts_t=[f"{problem}\nHint: {answer}" for problem, answer in PROBLEMS],
            max_new_tokens=64,
        )
    with path.open("w", encoding="utf-8") as file:
        for (problem, answer), text, error in zip(
            PROBLEMS, outputs.generated_texts or [], outputs.errors, strict=True
        ):
            if not error:
                file.write(
                    json.dumps({"problem": problem, "answer": answer, "completion": text}) + "\n"
                )
    print(f"{path}: {sum(not error for error in outputs.errors)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "completions.jsonl"))
