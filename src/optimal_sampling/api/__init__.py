"""Classes that take lists of prompts: `batch` is what they share, `local` and `vllm` hold one each."""
