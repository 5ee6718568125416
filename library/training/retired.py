"""Options of sd-scripts' training scripts that are refused: those that are gone for good, and those that this version does not have yet."""

from library.models.architecture import Architecture

RETIRED = {
    "dataset_class": "retired: data comes from the dataset file, and no other code is run for it; leave it out",
    "disable_mmap_load_safetensors": "retired: weights are cast one by one as they are read; no second copy is made; leave it out",
    "full_fp16": "retired: gradients of adapters in fp16 vanish or overflow; use --full_bf16, or --mixed_precision fp16 alone",
    "mem_eff_attn": "retired: torch's scaled_dot_product_attention is always on; leave it out",
    "train_inpainting": "inpainting models are not trained here; leave it out",
    "use_8bit_adam": "retired: use --optimizer_type AdamW8bit",
    "use_lion_optimizer": "retired: use --optimizer_type Lion",
}
"""Options that do not come back -> why, and what to use."""

NOT_YET = (
    "async_upload", "deepspeed", "fp16_master_weights_and_gradients", "huggingface_path_in_repo", "huggingface_repo_id",
    "huggingface_repo_type", "huggingface_repo_visibility", "huggingface_token", "initial_epoch", "initial_step", "log_tracker_config",
    "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path", "resume",
    "resume_from_huggingface", "save_last_n_epochs_state", "save_last_n_steps_state", "save_state", "save_state_on_train_end",
    "save_state_to_huggingface", "skip_until_initial_step", "wandb_api_key", "wandb_run_name", "zero3_init_flag",
    "zero3_save_16bit_model", "zero_stage",
)  # fmt: skip
LATER = "an option of sd-scripts that this version does not have yet; leave it out"

IDLE = {"zero_stage": 2}
"""Values, besides nothing and false, with which sd-scripts' config files list refused options that are not used."""


def refused_options(arch: Architecture) -> dict[str, str]:
    """Every option that a family's training script refuses -> the advice to give."""
    return {**RETIRED, **dict.fromkeys(NOT_YET, LATER), **arch.refused}
