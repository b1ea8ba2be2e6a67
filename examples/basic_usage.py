"""Sample from the mixture of two models and look at what was drawn.

Runs on a CPU in seconds, without a download.
"""

import torch

from optimal_sampling import OptimalSamplingModel


def main() -> None:
    # The shipped pair learned arithmetic. Any two models with one tokenizer do, by folder or hub
    # id, such as "Qwen/Qwen2.5-1.5B-Instruct" and "Qwen/Qwen2.5-3B-Instruct" in torch.bfloat16.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with OptimalSamplingModel(
        "toy-student", "toy-teacher", device=device, enable_chat_template=True
    ) as model:
        outputs = model.generate(
            ["61*8=?", "87*2+74=?", "82+97+14-69=?"], max_new_tokens=64, temperature=0.8
        )
    diagnostics = outputs.diagnostics
    for i, text in enumerate(outputs.generated_texts or []):
        alpha, tokens = outputs.alpha_values[i].mean(), diagnostics["num_tokens"][i]
        print(f"{text}\n  alpha {alpha:.2f}, {tokens} tokens")
    kl_student, kl_teacher = diagnostics["kl_theta_mean"], diagnostics["kl_t_mean"]
    print(f"KL(q || student) {kl_student:.4f}, KL(q || teacher) {kl_teacher:.4f}")
    print(f"alpha where the models differ {diagnostics['alpha_weighted_mean']:.2f}")
    print(f"alpha moved to its bounds at {diagnostics['clamped_share']:.0%} of the tokens")


if __name__ == "__main__":
    main()
