"""The kinds of files that are about SDXL, told from their keys."""

from library.models import lookalikes
from library.models.lookalikes import Lookalike
from library.models.weights import Shapes

SDXL_MARKS = ("model.diffusion_model.input_blocks.", "conditioner.embedders.0.transformer.")  # all SDXL checkpoints have keys under both

FILES = (
    Lookalike(r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner", "give the base model"),
    Lookalike(r"^conditioner\.embedders\.0\.transformer\.", "an SDXL checkpoint", "give a complete SDXL checkpoint"),
    Lookalike(r"^(model\.diffusion_model\.)?input_blocks\.", "a U-Net without its text encoders", "give a complete SDXL checkpoint"),
    Lookalike(
        r"^(first_stage_model\.|vae\.)?(encoder\.down_blocks\.\d+\.resnets|(encoder|decoder)\.(down|up|mid))\.",
        "a VAE of Stable Diffusion without the other models",
        "give it to --vae",
    ),
    Lookalike(
        r"^(unet\.)?down_blocks\.", "a U-Net in diffusers layout", "give the folder that holds unet, vae, text_encoder and text_encoder_2"
    ),
)


def seems_to_be(shapes: Shapes) -> str | None:
    """Half a sentence that says which other kind of file these keys are, and what to do; None for an SDXL checkpoint or the unknown."""
    if all(any(key.startswith(mark) for key in shapes) for mark in SDXL_MARKS):
        return None
    return lookalikes.seems_to_be(shapes, "sdxl", "give a complete SDXL checkpoint")
