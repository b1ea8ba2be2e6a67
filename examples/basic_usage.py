"""Sample from the mixture of two models and look at what was drawn. Runs on a CPU in seconds, without a download."""

import torch

from optimal_sampling import OptimalSamplingModel


def main() -> None:
    # The shipped pair learned arithmetic. Any two models with one tokenizer do, by folder or hub id:
    # OptimalSamplingModel("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct", dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with OptimalSamplingModel(
        "toy-student", "toy-teacher", device=device, enable_chat_template=True
    ) as model:
        outputs = model.generate(
            ["61*8=?", "87*2+74=?", "82+97+14-69=?"], max_new_tokens=64, temperature=0.8
        )
    for i, text in enumerate(outputs.generated_texts or []):
        print(
            f"{text}\n  alpha {outputs.alpha_values[i].mean():.2f}, {outputs.diagnostics['num_tokens'][i]} tokens"
        )
    diagnostics = outputs.diagnostics
    print(
        f"KL(q || student) {diagnostics['kl_theta_mean']:.4f}, KL(q || teacher) {diagnostics['kl_t_mean']:.4f}"
    )
    print(f"alpha moved to its bounds at {diagnostics['clamped_share']:.0%} of the tokens")


if __name__ == "__main__":
    main()
