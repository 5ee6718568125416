"""The options that name Anima's files, in training and in generation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from library.core.devices import dtype_named
from library.core.options import declared, option
from library.core.rules import Rule
from library.models.anima.checkpoint import check_files
from library.models.attention import SDPA_IN_VAIN, AttentionMode, AttentionOptions, TrainingAttention, missing_package

LENGTHS = ("qwen3_max_token_length", "t5_max_token_length", "vae_chunk_size")
VAE_RULES = (
    Rule(option="vae_disable_cache", when=lambda v: v["vae_disable_cache"], because="a VAE of single pictures has nothing to keep"),
    Rule(option="qwen_image_vae_2d", when=lambda v: v["qwen_image_vae_2d"], because="the VAE always computes in two dimensions"),
)


@dataclass(kw_only=True, frozen=True)
class SharedFiles:
    """What both scripts say of an Anima model, under the same names."""

    vae: str | None = option(None, help="Qwen-Image VAE: a .safetensors file or a folder; the one in the DiT's folder where absent")
    llm_adapter_path: str | None = option(None, help="LLM adapter to use instead of the one inside the DiT's file")
    t5_tokenizer_path: str | None = option(
        None, help="T5 tokenizer: its folder, tokenizer.json or spiece.model; by default found beside the DiT or in the hub's cache"
    )
    qwen3_tokenizer_path: str | None = option(
        None, help="Qwen3 tokenizer: its folder; by default found beside the text encoder or in the hub's cache"
    )
    tokenizer_cache_dir: str | None = option(None, help="folder where tokenizers are looked for, and kept once downloaded")
    qwen3_max_token_length: int = option(512, help="longest text in Qwen3's tokens; longer ones are cut")
    t5_max_token_length: int = option(512, help="longest text in T5's tokens; longer ones are cut")
    no_half_vae: bool = option(False, help="keep the VAE in 32-bit floats")
    vae_chunk_size: int | None = option(None, help="rows of a picture that the VAE computes at a time: less memory, the same result")
    vae_disable_cache: bool = option(False, help="accepted for sd-scripts' commands: a VAE of single pictures has nothing to keep")
    qwen_image_vae_2d: bool = option(False, help="accepted for sd-scripts' commands: the VAE always computes in two dimensions")

    def lengths_below_one(self) -> Iterator[str]:
        """What is wrong with numbers of tokens and rows."""
        for name in LENGTHS:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"


@dataclass(kw_only=True, frozen=True)
class ModelOptions(SharedFiles, TrainingAttention):
    """The files of an Anima model."""

    pretrained_model_name_or_path: str = option(
        help="Anima's DiT: a .safetensors file, or a folder in diffusers layout that may hold the other models too"
    )
    qwen3: str | None = option(None, help="Qwen3 text encoder: a .safetensors file or a folder; the one in the DiT's folder where absent")
    RULES: ClassVar[tuple[Rule, ...]] = (SDPA_IN_VAIN, *VAE_RULES)

    def check(self) -> Iterable[str]:
        """What is wrong: lengths below one, an attention that cannot train, a file without the other models."""
        yield from self.lengths_below_one()
        yield from self.attention_problems()
        if not self.dit.is_dir():
            for name, what in (("qwen3", "the Qwen3 text encoder"), ("vae", "the Qwen-Image VAE")):
                if getattr(self, name) is None:
                    yield f"--{name} is required: {what}; only a diffusers folder holds it beside the DiT"

    @property
    def dit(self) -> Path:
        """Where the DiT is."""
        return Path(self.pretrained_model_name_or_path)

    @property
    def text_encoder(self) -> Path:
        """Where the text encoder is."""
        return Path(self.qwen3) if self.qwen3 is not None else self.dit / "text_encoder"

    @property
    def vae_path(self) -> Path:
        """Where the VAE is."""
        return Path(self.vae) if self.vae is not None else self.dit / "vae"


@dataclass(kw_only=True, frozen=True)
class GenerationFiles(SharedFiles, AttentionOptions):
    """Models."""

    dit: str | None = option(None, help="Anima's DiT: a .safetensors file, or a folder in diffusers layout that may hold the other models")
    text_encoder: str | None = option(
        None, help="Qwen3 text encoder: a .safetensors file or a folder; by default the one in the DiT's folder"
    )
    attn_mode: AttentionMode = option("torch", help="attention of the denoiser: torch and sdpa are torch's own; the others are packages")
    precision: Literal["bf16", "fp16", "fp32"] | None = option(None, help="dtype of the models; bf16 on a GPU, fp32 on a CPU where absent")

    for_drawing: ClassVar[tuple[str, ...]] = (
        "text_encoder", "llm_adapter_path", "t5_tokenizer_path", "qwen3_tokenizer_path", "tokenizer_cache_dir",
        "qwen3_max_token_length", "t5_max_token_length", "attn_mode", "split_attn",
    )  # fmt: skip
    for_decoding: ClassVar[tuple[str, ...]] = ("vae", "no_half_vae", "vae_chunk_size")
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(option="dit", when=lambda v: v.get("latent_path") and v["vae"], because="--latent_path only decodes, with --vae"),
        *VAE_RULES,
    )

    def check(self) -> Iterable[str]:
        """What is wrong: lengths below one, an attention whose package is not installed."""
        yield from self.lengths_below_one()
        if (problem := missing_package(self.attn_mode)) is not None:
            yield problem

    def missing(self, *, draws: bool, decodes: bool) -> Iterable[str]:
        """What is needed for drawing latents, or for decoding them, and was not given or is not there."""
        is_folder = self.dit is not None and Path(self.dit).is_dir()
        needed = {
            "dit": ("Anima's DiT, a .safetensors file, or a folder in diffusers layout", draws),
            "text_encoder": ("the Qwen3 text encoder; only a diffusers folder holds it beside the DiT", draws and not is_folder),
            "vae": ("the Qwen-Image VAE; only a diffusers folder holds it beside the DiT", decodes and not is_folder),
        }
        for name, (what, is_needed) in needed.items():
            given, is_read = getattr(self, name), decodes if name == "vae" else draws
            if given is None and is_needed:
                yield f"--{name} is required: {what}"
            elif given is not None and is_read and not Path(given).exists():
                yield f"--{name} {given}: no such file or folder"

    def check_models(self, *, decodes: bool) -> None:
        """Raises `ValueError` where files for drawing, and for decoding too, are not whole or do not fit each other; reads headers only."""
        files, adapter = self.model_options(), self.llm_adapter_path
        check_files(files.dit, files.text_encoder, files.vae_path if decodes else None, None if adapter is None else Path(adapter))

    def model_options(self) -> ModelOptions:
        """The same files as the training script names them."""
        other = {"pretrained_model_name_or_path": self.dit or "", "qwen3": self.text_encoder}
        same = {entry.name for entry in declared(ModelOptions)} & {entry.name for entry in declared(GenerationFiles)} - other.keys()
        return ModelOptions(**other, **{name: getattr(self, name) for name in same})

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of the models."""
        if self.precision is not None:
            return dtype_named(self.precision)
        return torch.float32 if device.type == "cpu" else torch.bfloat16


BY_REGEX = 'a rate of its own for these layers is a network argument: --network_args "network_reg_lrs={}=1e-4"'
NO_BETAS = "Anima is a flow and has no noise schedule that this could change; leave it out"

NOT_ANIMA = {
    **dict.fromkeys(
        (
            "min_snr_gamma", "v_parameterization", "zero_terminal_snr", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss",
            "debiased_estimation_loss",
        ),
        NO_BETAS,
    ),
    "v2": "this script trains Anima, which has no versions of Stable Diffusion",
    "weighted_captions": "Anima's text encoder is a language model, which reads brackets as they stand; leave it out",
    "clip_skip": "Anima has no CLIP text encoder; leave it out",
    "max_token_length": "use --qwen3_max_token_length and --t5_max_token_length",
    "self_attn_lr": BY_REGEX.format(r"blocks\.\d+\.self_attn.*"),
    "cross_attn_lr": BY_REGEX.format(r"blocks\.\d+\.cross_attn.*"),
    "mlp_lr": BY_REGEX.format(r"blocks\.\d+\.mlp.*"),
    "mod_lr": BY_REGEX.format(r"blocks\.\d+\.adaln_modulation.*") + " \"include_patterns=['blocks.*_modulation.*']\" (which adapts them)",
    "llm_adapter_lr": BY_REGEX.format(r"llm_adapter.*") + " train_llm_adapter=True (which adapts them)",
    "fp16_safe_patch": "fp16 is computed with a 32-bit residual stream anyway; leave it out",
    "conditioning": "an option of a fork of sd-scripts; leave it out",
    "sdxl": "this script draws with Anima",
}  # fmt: skip
"""Options of sd-scripts that mean nothing for Anima, or are said in another way -> the reason."""
