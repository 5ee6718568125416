"""The kinds of files that are about Anima, told from their keys."""

from library.models import lookalikes
from library.models.lookalikes import Lookalike
from library.models.weights import Shapes

DIT = Lookalike(
    r"(^|\.)blocks\.\d+\.adaln_modulation_self_attn\.|(^|\.)x_embedder\.proj\.1\.",
    "an Anima DiT",
    "give it to --pretrained_model_name_or_path (--dit for anima_minimal_inference.py)",
)
ADAPTER = Lookalike(
    r"(^|\.)llm_adapter\.|^blocks\.\d+\.(cross_attn\.k_norm|norm_cross_attn)\.", "an llm adapter", "give it to --llm_adapter_path"
)
ENCODER = Lookalike(
    r"(^|\.)layers\.\d+\.self_attn\.q_norm\.", "a Qwen3 text encoder", "give it to --qwen3 (--text_encoder for anima_minimal_inference.py)"
)
VAE = Lookalike(
    r"(^|\.)(encoder|decoder)\.(down|up)samples\.\d+\.(residual|resample)\.|(^|\.)encoder\.down_blocks\.\d+\.(norm1|conv1|resample)\.",
    "a Qwen-Image or Wan 2.1 VAE",
    "give it to --vae",
)
FOLDER = Lookalike(
    r"^(transformer\.)?transformer_blocks\.\d+\.norm1\.linear_1\.|^text_conditioner\.",
    "a transformer in diffusers layout",
    "give the folder that holds transformer, text_conditioner, text_encoder and vae",
)
FILES = (DIT, ADAPTER, ENCODER, VAE, FOLDER)


def seems_to_be(shapes: Shapes, asked: Lookalike) -> str | None:
    """Half a sentence that says which other kind of file these keys are, and what to do; None for `asked` or the unknown."""
    return lookalikes.seems_to_be(shapes, "anima", "Anima needs a DiT, a Qwen3-0.6B text encoder and a Qwen-Image VAE", asked)
