"""Classes for lists of prompts, one per engine.

    batch     what they share
    notebook  outputs as coloured text
    local     `OptimalSamplingModel`, on the local engine
    vllm      `OptimalSamplingV1`, on vLLM

A further class opens its engine as `_engine` and turns the rows of `BatchSampler._sample` into its
own output.
"""
