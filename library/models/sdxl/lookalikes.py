"""What a tensor file seems to be when it is not an SDXL checkpoint, told from its keys."""

import re
from dataclasses import dataclass

from library.models.sdxl.configuration import Shapes

SDXL_MARKS = ("model.diffusion_model.input_blocks.", "conditioner.embedders.0.transformer.")  # all SDXL checkpoints have keys under both


@dataclass(frozen=True)
class Lookalike:
    """Another kind of file: a pattern that one of its keys has, what it is, and what to do with it."""

    pattern: str
    what: str
    advice: str = "give a complete SDXL checkpoint"


# The first that fits is said: special kinds stand before the kinds whose marks they share.
LOOKALIKES = (
    Lookalike(
        r"lora_(down|up|A|B)\b|hada_w1_a|lokr_w[12]|oft_(blocks|diag)|\.diff_b?$",
        "an adapter",
        "give adapters to --network_weights or --base_weights",
    ),
    Lookalike(r"(^|\.)blocks\.\d+\.adaln_modulation_self_attn|llm_adapter\.", "an Anima DiT", "use anima_train_network.py for it"),
    Lookalike(r"joint_blocks\.|double_blocks\.|double_stream|context_refiner\.", "a Stable Diffusion 3, Flux or similar transformer"),
    Lookalike(r"^cond_stage_model\.transformer\.", "a Stable Diffusion 1.x checkpoint"),
    Lookalike(r"^cond_stage_model\.model\.", "a Stable Diffusion 2.x checkpoint"),
    Lookalike(r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner", "give the base model"),
    Lookalike(r"^(model\.diffusion_model\.)?input_blocks\.", "a U-Net without its text encoders"),
    Lookalike(r"^(encoder|decoder)\.(downsamples|upsamples)\.", "a Qwen-Image or Wan VAE"),
    Lookalike(r"^(first_stage_model\.)?(encoder|decoder)\.(down|up|mid)", "a VAE without the other models", "give it to --vae"),
    Lookalike(r"^(model\.)?layers\.\d+\.self_attn", "a language model"),
    Lookalike(
        r"^(unet\.)?down_blocks\.", "a U-Net in diffusers layout", "give the folder that holds unet, vae, text_encoder and text_encoder_2"
    ),
    Lookalike(r"text_model\.encoder\.layers|resblocks\.", "a text encoder without the other models"),
)


def seems_to_be(shapes: Shapes) -> str | None:
    """Half a sentence that says which other kind of file these keys are, and what to do; None for an SDXL checkpoint or the unknown."""
    if all(any(key.startswith(mark) for key in shapes) for mark in SDXL_MARKS):
        return None
    kind = next((kind for kind in LOOKALIKES if any(map(re.compile(kind.pattern).search, shapes))), None)
    return f"it seems to be {kind.what}; {kind.advice}" if kind else None
