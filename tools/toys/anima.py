"""The toy Anima: Anima's own classes at a small size.

Everything that a loader cannot read from the shapes of a checkpoint equals Anima: patches of 2x2 latents, the scale of rotary positions,
Qwen3's activation and rotary base, the VAE's depth and the mean and deviation of its latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, CosmosTransformer3DModel
from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
from transformers import Qwen3Config, Qwen3Model

from library.models.anima.tokenizers import Tokenizer, find_tokenizers
from tools.toys.anima_words import save_tokenizers
from tools.toys.training import Network

VAE_CHANNELS = 12  # of the first level; 1, 2, 4 and 4 times as many in the levels, as in Anima
TRANSFORMER: dict[str, Any] = {
    "in_channels": 17,  # 16 of the latents, one of the padding mask
    "out_channels": 16,
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "num_layers": 5,
    "text_embed_dim": 128,
    "adaln_lora_dim": 48,
    "max_size": (128, 512, 512),
    "rope_scale": (1.0, 4.0, 4.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
}
CONDITIONER: dict[str, Any] = {"source_dim": 96, "target_dim": 128, "model_dim": 128, "num_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@dataclass(kw_only=True)
class ToyAnima:
    """The four networks of the toy Anima and its tokenizers, Qwen's and T5's."""

    transformer: Network  # CosmosTransformer3DModel
    conditioner: Network  # AnimaTextConditioner
    encoder: Network  # Qwen3Model
    vae: Network  # AutoencoderKLQwenImage
    tokenizers: list[Tokenizer]

    def modules(self) -> dict[str, Network]:
        """The networks by the names of their scratch files."""
        return {
            "anima_vae": self.vae,
            "anima_transformer": self.transformer,
            "anima_conditioner": self.conditioner,
            "anima_encoder": self.encoder,
        }


def build_anima(folder: Path, seed: int = 0) -> ToyAnima:
    """Untrained toy models, the same for the same seed; the tokenizers are written into the folder first."""
    save_tokenizers(folder)
    tokenizers = find_tokenizers(folder / "qwen3.safetensors", None, folder / "dit.safetensors")
    torch.manual_seed(seed)
    vae = AutoencoderKLQwenImage(base_dim=VAE_CHANNELS)
    torch.manual_seed(seed + 1)
    return ToyAnima(
        vae=vae,
        transformer=CosmosTransformer3DModel(**TRANSFORMER),
        conditioner=AnimaTextConditioner(target_vocab_size=tokenizers[1].size, **CONDITIONER),
        encoder=Qwen3Model(Qwen3Config(vocab_size=tokenizers[0].size, **TEXT)),
        tokenizers=tokenizers,
    )
