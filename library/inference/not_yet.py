"""Options of sd-scripts' generation script that this version does not have yet: refused by name, never ignored."""

LATER = "an option of sd-scripts that this version does not have yet; leave it out"

NOT_YET = dict.fromkeys(
    """
        console_log_level console_log_file console_log_simple pyramid_noise_prob
        pyramid_noise_discount_range noise_offset_prob noise_offset_range from_module prompter_module_args interactive no_preview
        image_path mask_path strength use_original_file_name original_height original_width original_height_negative
        original_width_negative crop_top crop_left vae_batch_size vae_slices iter_same_seed shuffle_prompts opt_channels_last
        network_show_meta network_merge_n_models network_pre_calc network_regional_mask_max_color_codes textual_inversion_embeddings
        emb_normalize_mode force_scheduler_zero_steps_offset guide_image_path highres_fix_scale highres_fix_steps highres_fix_strength
        highres_fix_save_1st highres_fix_latents_upscaling highres_fix_upscaler highres_fix_upscaler_args
        highres_fix_disable_control_net negative_scale control_net_lllite_models control_net_models control_net_preps
        control_net_multipliers control_net_ratios clip_vision_strength ds_depth_1 ds_timesteps_1 ds_depth_2 ds_timesteps_2 ds_ratio
        gradual_latent_timesteps gradual_latent_ratio gradual_latent_ratio_step gradual_latent_every_n_steps gradual_latent_s_noise
        gradual_latent_unsharp_params
    """.split(),
    LATER,
) | {
    "xformers": "use --attn_mode xformers",
    "diffusers_xformers": "use --attn_mode xformers",
    "sdpa": "torch's scaled_dot_product_attention is always on; leave it out",
}
