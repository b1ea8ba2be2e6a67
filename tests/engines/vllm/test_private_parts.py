"""Private parts of vLLM that the engine uses, listed in docs/vllm.md: each is as it was tested.

What would change silently comes first: such a change raises nothing and gives other tokens.
"""

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from optimal_sampling.serve.request_body import COMPLETIONS, ServerSettings, translate_body
from optimal_sampling.vocabulary import Vocabulary

V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
METADATA = "vllm.v1.attention.backend:CommonAttentionMetadata"


def part(path):
    """The object at `module:name.name`."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


SILENT = {
    f"{V2}.execute_model": "need_eager=is_profile or skip_compiled",
    f"{V1}._bookkeeping_sync": (
        "return ( num_nans_in_logits, num_nans, logprobs_lists, valid_sampled_token_ids,"
    ),
    "vllm.v1.engine.input_processor:InputProcessor.assign_request_id": (
        'f"{request.external_req_id}-{random_uuid():.8}"'
    ),
    "vllm.v1.engine.parallel_sampling:ParentRequest": 'f"{index}_{self.request_id}"',
    "vllm.entrypoints.openai.completion.serving": 'f"{request_id}-{i}"',
    "vllm.entrypoints.openai.chat_completion.serving": 'f"chatcmpl-{self._base_request_id',
    "vllm.model_executor.layers.attention.attention:Attention.__init__": (
        "# model-level sliding window sliding_window = cache_config.sliding_window"
    ),
    "vllm.config.vllm:VllmConfig.__post_init__": (
        "if self.model_config is not None and self.model_config.is_submodel_config:"
    ),
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": (
        'if layer_types is None or all(lt == "sliding_attention" for lt in layer_types):'
    ),
    "vllm.v1.sample.sampler:Sampler.apply_temperature": "logits.div_(temp.unsqueeze(dim=1))",
}
"""Source that must have this text. On the values and the order that it fixes, the engine relies."""


@pytest.mark.parametrize("path", SILENT)
def test_source_whose_change_would_be_silent(path):
    """Guards: traces of other requests, another distribution, CUDA graphs of other tokens."""
    found = part(path) if ":" in path else importlib.import_module(path)
    source = " ".join(inspect.getsource(found).split())
    assert SILENT[path] in source, f"{path} has changed"


def test_is_profile_has_no_further_effect_on_a_step():
    """Guards: a step of two prompts, run as a profiling step, that leaves something else out."""
    lines = inspect.getsource(part(f"{V2}.execute_model")).splitlines()
    used = [line.strip() for line in lines if "is_profile" in line]
    assert used == [
        "is_profile: bool = False,",
        "need_eager=is_profile or skip_compiled,",
        "is_padding=not is_profile,",  # of a dummy batch
        "if dummy_run and is_profile and not valid_dummy_state_slots:",
    ]


def test_fields_of_the_attention_metadata():
    """Guards: a new field that the engine leaves at its default, where vLLM sets another value."""
    given = {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
        "positions",
        "is_prefilling",
    }
    left_out = {
        "logits_indices_padded",
        "num_logits_indices",
        "max_logits_per_req",
        "encoder_seq_lens",
        "encoder_seq_lens_cpu",
        "dcp_local_seq_lens",
        "dcp_local_seq_lens_cpu_upper_bound",
        "req_idx",
        "mm_req_doc_ranges",
        "rswa_prefix_lens",
        "replayssm_decode_base_cpu",
    }
    names = {item.name for item in fields(part(METADATA)) if item.init}
    assert {name for name in names if not name.startswith("_")} == given | left_out


ATTRIBUTES = {
    V1: (
        "input_batch discard_request_mask attn_groups model_config vllm_config device "
        "kv_cache_config"
    ),
    V2: "block_tables attn_groups model_config vllm_config device kv_cache_config",
    "vllm.config:ModelConfig": "original_max_model_len",
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": (
        "sliding_window block_size page_size_padded extra_retained_tokens"
    ),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": "sliding_window",
    "vllm.model_executor.layers.attention.attention:Attention": "sliding_window",
    "vllm.model_executor.layers.linear": "UnquantizedLinearMethod",
    "vllm.model_executor.layers.vocab_parallel_embedding": "UnquantizedEmbeddingMethod",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "req_ids block_table generators num_reqs",
    "vllm.v1.worker.gpu.block_table:BlockTables": "input_block_tables block_sizes",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "req_ids",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": (
        "copy_event num_sampled_tokens_np sampled_token_ids"
    ),
    "vllm.v1.worker.utils:AttentionGroup": "layer_names build_metadata kv_cache_group_id",
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "finished_req_ids scheduled_new_reqs scheduled_cached_reqs scheduled_spec_decode_tokens "
        "num_scheduled_tokens"
    ),
    "vllm.v1.core.sched.output:CachedRequestData": "req_ids num_computed_tokens",
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id prompt_token_ids sampling_params num_computed_tokens"
    ),
    "vllm.v1.request:Request": (
        "sampling_params prompt_token_ids num_prompt_tokens _all_token_ids cache_salt block_hashes "
        "skip_reading_prefix_cache request_id update_block_hashes"
    ),
    "vllm.v1.engine.core_client:InprocClient": "_finalizer engine_core",
    "vllm.v1.engine.async_llm:AsyncLLM": "shutdown collective_rpc",
    "vllm.model_executor.model_loader.default_loader": "secondary_weights",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": "show_available_models",
    "vllm.entrypoints.launchers.api_server.app_state": "online_renderer vllm_config",
    "vllm.renderers.online_renderer:OnlineRenderer": "renderer render_chat",
    "vllm.triton_utils.dispatcher": "_registry _impl _forward_by_name",
    "vllm.utils.cpu_triton_utils": "_expand_kernel_impl",
    "vllm.v1.sample.ops.topk_topp_sampler": "apply_top_k_only",
    "vllm.v1.worker.workspace": (
        "reset_workspace_manager is_workspace_manager_initialized current_workspace_manager"
    ),
    "vllm.v1.engine.core": "cleanup_dist_env_and_memory",
    "vllm.distributed.parallel_state": "_TP init_model_parallel_group get_world_group",
}
"""Names that the source of a module or class has."""


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_names(path):
    """Guards: an attribute that has another name, or is set without effect."""
    found = part(path) if ":" in path else importlib.import_module(path)
    classes = inspect.getmro(found)[:-1] if inspect.isclass(found) else [found]
    source = "\n".join(inspect.getsource(each) for each in classes)
    for name in ATTRIBUTES[path].split():
        assert re.search(rf"\b{name}\b", source), f"{path} has no {name}"


SIGNATURES = {
    f"{V1}.execute_model": "scheduler_output",
    f"{V1}._model_forward": "input_ids positions intermediate_tensors inputs_embeds model_kwargs",
    f"{V1}.sample_tokens": "grammar_output",
    f"{V1}._bookkeeping_sync": "scheduler_output sampler_output logits",
    f"{V1}.get_model": "",
    f"{V2}.execute_model": "scheduler_output intermediate_tensors dummy_run",
    f"{V2}.prepare_inputs": "scheduler_output",
    f"{V2}.sample_tokens": "grammar_output",
    f"{V2}.get_model": "",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "request",
    "vllm.v1.worker.gpu_worker:Worker.init_device": "",
    "vllm.v1.worker.gpu_worker:Worker.initialize_from_config": "kv_cache_config",
    "vllm.forward_context:set_forward_context": "attn_metadata vllm_config num_tokens",
    "vllm.entrypoints.launchers.api_server.entry:build_async_engine_client": "args",
    "vllm.entrypoints.launchers.api_server.entry:build_and_serve": (
        "engine_client listen_address sock args"
    ),
    "vllm.entrypoints.launchers.launcher:setup_server": "args",
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast": "input_ src",
    "vllm.model_executor.model_loader.utils:initialize_model": "vllm_config prefix",
    "vllm.model_executor.model_loader.weight_tying:maybe_retie_word_embeddings": (
        "model model_config"
    ),
    "vllm.tokenizers.hf:get_cached_tokenizer": "tokenizer",
    "vllm.v1.kv_cache_interface:replace_as": "spec target_cls drop",
    "vllm.config:VllmConfig.get_quantization_config": "model_config load_config",
    "vllm.config:VllmConfig.with_hf_config": "hf_config architectures",
    "vllm.config:ModelConfig.maybe_untie_word_embeddings": "",
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.get_quant_method": (
        "layer prefix"
    ),
    "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec": "",
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": "",
    "vllm.v1.worker.gpu_worker:Worker.load_model": "",
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": "",
    "vllm.v1.core.kv_cache_utils:check_enough_kv_cache_memory": (
        "vllm_config kv_cache_spec available_memory"
    ),
}
"""First parameters of functions that are called or overridden."""


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    """Guards: an override that is no longer called, or with other arguments."""
    names = [name for name in inspect.signature(part(path)).parameters if name != "self"]
    expected = SIGNATURES[path].split()
    assert set(expected) <= set(names)


def test_fields_of_vllm_are_no_misspelling_of_ours():
    """Guards: a request of vLLM's own fields that is refused as misspelt."""
    vocabulary = Vocabulary.load("toy-student", "toy-teacher", False)
    settings = ServerSettings(vocabulary, part("optimal_sampling.config:MixtureConfig")(), 512)
    for path in (
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest",
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest",
    ):
        names = part(path).model_fields
        assert translate_body({**dict.fromkeys(names), "prompt": "1"}, COMPLETIONS, settings)


def test_the_documentation_lists_every_part():
    """Guards: a list that is not kept up."""
    text = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text()
    modules = {path.partition(":")[0] for path in (*SILENT, *ATTRIBUTES, *SIGNATURES, METADATA)}
    missing = sorted(module for module in modules if f"`{module}`" not in text)
    assert not missing
