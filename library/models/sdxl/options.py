"""The options that name SDXL's files, in training and in generation."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch

from library.core.options import option
from library.core.rules import Rule
from library.diffusion.ddpm import PredictionOptions
from library.models.attention import SDPA_IN_VAIN, AttentionOptions, TrainingAttention, missing_package
from library.models.sdxl import text


@dataclass(kw_only=True, frozen=True)
class ModelOptions(TrainingAttention, PredictionOptions):
    """The files of an SDXL model."""

    pretrained_model_name_or_path: str = option(help="SDXL checkpoint: a .safetensors file, or a folder in diffusers layout")
    vae: str | None = option(None, help="VAE to use instead of the checkpoint's: a .safetensors file or a folder in diffusers layout")
    no_half_vae: bool = option(False, help="keep the VAE in 32-bit floats; the original SDXL VAE overflows in fp16")
    tokenizer: str | None = option(None, help="folder with vocab.json and merges.txt; by default found beside the checkpoint or installed")
    tokenizer_cache_dir: str | None = option(None, help="folder where the tokenizer is looked for, and kept once downloaded")
    max_token_length: Literal[75, 150, 225] | None = option(None, help="longest caption in tokens (75 if not given); longer ones are cut")
    weighted_captions: bool = option(False, help="captions weigh their words: (more), [less], (so much:1.3); previews do too")
    RULES: ClassVar[tuple[Rule, ...]] = (SDPA_IN_VAIN,)

    def check(self) -> Iterable[str]:
        """What is wrong: an attention that cannot train or is not installed, a prediction that cannot be."""
        yield from self.attention_problems()
        yield from self.prediction_problems()

    @property
    def checkpoint(self) -> Path:
        return Path(self.pretrained_model_name_or_path)

    @property
    def tokens(self) -> int:
        """The length of captions that holds, in tokens."""
        return self.max_token_length or text.CHUNK


@dataclass(kw_only=True, frozen=True)
class GenerationFiles(AttentionOptions, PredictionOptions):
    """Models."""

    ckpt: str = option(help="model file (.safetensors) or diffusers folder")
    vae: str | None = option(None, help="another VAE than the one in --ckpt")
    tokenizer: str | None = option(None, help="folder with the tokenizer's vocab.json and merges.txt")
    tokenizer_cache_dir: str | None = option(None, help="folder where tokenizers from the hub are kept")
    max_embeddings_multiples: int = option(1, help="chunks of 75 tokens that a prompt may take: 1, 2 or 3")
    sdxl: bool = option(False, help="the model is SDXL; it always is here, accepted for sd-scripts' commands")
    no_half_vae: bool = option(False, help="run the VAE in fp32")
    fp16: bool = option(False, help="run in fp16")
    bf16: bool = option(False, help="run in bf16")

    def check(self) -> Iterable[str]:
        """What is wrong: two precisions, more chunks than a prompt may have, an attention whose package is not installed."""
        yield from self.prediction_problems()
        if (problem := missing_package(self.attn_mode or "torch")) is not None:
            yield problem
        if self.fp16 and self.bf16:
            yield "--fp16 and --bf16 exclude each other"
        if self.max_embeddings_multiples not in (1, 2, 3):
            yield f"--max_embeddings_multiples {self.max_embeddings_multiples}: must be 1, 2 or 3"

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of the models; no CPU runs them in fp16."""
        if self.fp16 and device.type == "cpu":
            raise ValueError("--fp16: a CPU cannot run these models in fp16; use --bf16, or leave it out")
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32

    def model_options(self) -> ModelOptions:
        """The same files as the training script names them."""
        return ModelOptions(
            pretrained_model_name_or_path=self.ckpt,
            vae=self.vae,
            tokenizer=self.tokenizer,
            tokenizer_cache_dir=self.tokenizer_cache_dir,
            max_token_length=cast(Any, 75 * self.max_embeddings_multiples),
            no_half_vae=self.no_half_vae,
            v_parameterization=self.v_parameterization,
            zero_terminal_snr=self.zero_terminal_snr,
            attn_mode=self.attn_mode,
            split_attn=self.split_attn,
        )


NOT_SDXL = {
    "v1": "SD 1.x models are not drawn here; this script draws with SDXL",
    "v2": "SD 2.x models are not known here; this script is for SDXL",
    "clip_skip": "SDXL always reads the penultimate layer of both text encoders; leave it out",
}
"""Options of sd-scripts that mean nothing for SDXL -> the reason."""
