"""Options of sd-scripts' training scripts that this version does not have yet: refused by name, never ignored."""

LATER = "an option of sd-scripts that this version does not have yet; leave it out"

NOT_YET = dict.fromkeys(
    """
        v_parameterization zero_terminal_snr metadata_usage_hint metadata_thumbnail metadata_merged_from
        metadata_preprocessor metadata_is_negative_embedding huggingface_repo_id huggingface_repo_type huggingface_path_in_repo
        huggingface_token huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload
        save_n_epoch_ratio save_last_n_epochs_state save_last_n_steps_state save_state save_state_on_train_end resume torch_compile
        dynamo_backend full_fp16 full_bf16 ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph wandb_run_name
        log_tracker_config wandb_api_key log_config console_log_simple noise_offset noise_offset_random_strength
        multires_noise_iterations ip_noise_gamma ip_noise_gamma_random_strength multires_noise_discount adaptive_noise_scale
        huber_schedule huber_c huber_scale lowram sample_sampler output_config deepspeed zero_stage offload_optimizer_device
        offload_optimizer_nvme_path offload_param_device offload_param_nvme_path zero3_init_flag zero3_save_16bit_model
        fp16_master_weights_and_gradients lr_scheduler_type lr_scheduler_args lr_decay_steps fused_backward_pass
        lr_scheduler_timescale lr_scheduler_min_lr_ratio min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss
        debiased_estimation_loss cpu_offload_checkpointing fp8_base_unet skip_until_initial_step initial_epoch initial_step
        disable_mmap_load_safetensors compile compile_backend compile_mode compile_dynamic compile_fullgraph
        compile_cache_size_limit cuda_allow_tf32 cuda_cudnn_benchmark
    """.split(),
    LATER,
) | {
    "dataset_class": "retired: data comes from the dataset file, and no other code is run for it; leave it out",
    "train_inpainting": "inpainting models are not trained here; leave it out",
    "use_8bit_adam": "retired: use --optimizer_type AdamW8bit",
    "use_lion_optimizer": "retired: use --optimizer_type Lion",
    "mem_eff_attn": "retired: torch's scaled_dot_product_attention is always on; leave it out",
    "xformers": "retired: torch's scaled_dot_product_attention is always on; leave it out",
}
