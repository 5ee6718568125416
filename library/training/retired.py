"""Options of sd-scripts' training scripts that are gone for good, and refused."""

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


def refused_options(arch: Architecture) -> dict[str, str]:
    """Every option that a family's training script refuses -> the advice to give."""
    return {**RETIRED, **arch.refused}
