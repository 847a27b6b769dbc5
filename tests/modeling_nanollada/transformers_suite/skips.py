"""What of transformers' model tests does not run on our classes, and why: all of it, test by test."""

OWN_SKIPS = {
    "test_bc_cache_name_forward": "ours: it asks for a warning at `past_key_values`, which is no old name here",
    "test_generation_tester_mixin_inheritance": (
        "ours: it asks for transformers' tests of `generate`, which are not part of its source distribution"
    ),
}

# By the message with which transformers skips them, a regular expression of its beginning. What the machine or an
# optional library decides may also run.
MACHINE_SKIPS = {
    "test requires accelerator$": {
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_bin",
        "test_disk_offload_safetensors",
        "test_flex_attention_with_grads",
        "test_sdpa_can_compile_dynamic",
        "test_sdpa_can_dispatch_on_flash",
    },
    "test requires multiple accelerators": {"test_model_parallelism"},
    "test requires MPS": {"test_flash_attn_kernels_mps_inference_equivalence"},
    "test is slow": {"test_torch_compile_for_training"},  # and for an accelerator
    "test requires Flash Attention( [34])?$": {
        *(f"test_flash_attn_{n}_can_dispatch_composite_models" for n in (2, 3, 4)),
        *(f"test_flash_attn_{n}_from_config" for n in (2, 3, 4)),
        *(f"test_flash_attn_{n}_inference_equivalence" for n in (2, 3, 4)),
        *(f"test_flash_attn_{n}_inference_equivalence_right_padding" for n in (2, 3, 4)),
        "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break",
        "test_flash_attn_2_fp32_ln",
    },
    "test requires the kernels library": {
        "test_flash_attn_kernels_inference_equivalence",
        "test_kernels_can_load_without_crashing",
    },
    "test requires deepspeed": {
        "test_resize_embeddings_untied_with_deepspeed",
        "test_resize_embeddings_untied_with_deepspeed_multi_gpu",
        "test_resize_tokens_embeddings_with_deepspeed",
        "test_resize_tokens_embeddings_with_deepspeed_multi_gpu",
    },
}

# What our models do not have.
MODEL_SKIPS = {
    "Model is not a composite model": {"test_attn_implementation_composite_models"},
    "This model is not composite": {"test_can_set_attention_dynamically_composite_model"},
    "NanoLLaDAModel does not support SDPA": {"test_sdpa_can_dispatch_composite_models"},  # says so of non-composites
    "No subconfigs so the test does not make sense": {"test_internal_model_config_and_subconfig_are_same"},
    "Not an MoE model": {"test_moe_parallel_plans_shard_experts"},
    "This model has no sparse experts": {"test_moe_models_record_router_logits"},
    "This model has no `output_router_logits`": {"test_output_router_logits_from_config"},
    "NanoLLaDAModel does not support grouped_mm": {
        f"test_eager_matches_batched_and_grouped_inference_{case}" for case in ("0_fp16", "1_fp32", "2_bf16")
    },
    r"NanoLLaDA\w+ (class )?has no _keep_in_fp32_modules": {
        "test_keep_in_fp32_modules",
        "test_keep_in_fp32_modules_exist",
    },
    "No `_keep_in_fp32_modules_strict` defined": {"test_keep_in_fp32_modules_strict_also_hardcode_fp32"},
    "No conversion found": {"test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"},
    "No sequence-to-sequence language modeling head": {"test_encoder_decoder_loss_no_double_shift"},
    "Model does not have position embeddings": {"test_resize_position_vector_embeddings"},
    "Model does not support sliding window mask": {"test_sliding_window_mask"},
    "<class .*> has no axial RoPE": {"test_vision_axial_rope"},
    "This model does not have partial rope": {"test_model_rope_with_partial_rotation"},
    # `output_attentions` is taken, but not named in the signature; the tests of attention outputs run.
    "Model does not support output_attentions": {
        "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions"
    },
    # Only for the model types of a list in transformers, and with helpers that its source distribution lacks.
    "Tensor parallel distributed tests are not enabled": {
        "test_tp_backward",
        "test_tp_forward_0",
        "test_tp_forward_1",
        "test_tp_generation",
        "test_tp_generation_quantized",
    },
}
MASKED_SKIPS = {"No decoder-only language modeling head": {"test_causal_lm_loss_honors_shift_labels"}}
