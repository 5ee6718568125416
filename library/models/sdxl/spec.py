"""Stable Diffusion XL: its facts, its files, and what its models do in a training step."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from library.core.file_hash import file_sha256, sampled_file_hash, short_file_hash
from library.core.options import option
from library.data.batch import Sizes, TextStates
from library.diffusion.process import DDPMProcess, NoiseProcess
from library.models.architecture import Architecture, Models, Tokens
from library.models.sdxl import text
from library.models.sdxl.checkpoint import load_checkpoint
from library.models.sdxl.configuration import LATENT_SCALE
from library.models.sdxl.names import SDXLNaming
from library.models.sdxl.vocabulary import find_vocabularies


@dataclass(kw_only=True, frozen=True)
class ModelOptions:
    """The files of an SDXL model."""

    pretrained_model_name_or_path: str = option(help="SDXL checkpoint: a .safetensors file, or a folder in diffusers layout")
    vae: str | None = option(None, help="VAE to use instead of the checkpoint's: a .safetensors file or a folder in diffusers layout")
    no_half_vae: bool = option(False, help="keep the VAE in 32-bit floats; the original SDXL VAE overflows in fp16")
    tokenizer: str | None = option(None, help="folder with vocab.json and merges.txt; by default found beside the checkpoint or installed")
    tokenizer_cache_dir: str | None = option(None, help="folder where the tokenizer is looked for, and kept once downloaded")
    max_token_length: Literal[75, 150, 225] | None = option(None, help="longest caption in tokens (75 if not given); longer ones are cut")

    @property
    def checkpoint(self) -> Path:
        return Path(self.pretrained_model_name_or_path)

    @property
    def tokens(self) -> int:
        """The length of captions that holds, in tokens."""
        return self.max_token_length or text.CHUNK


class SDXL(SDXLNaming, Architecture):
    """Stable Diffusion XL base and its fine-tunes (Podell et al. 2023)."""

    base_model_version: ClassVar[str] = "sdxl_base_v1-0"
    modelspec_architecture: ClassVar[str] = "stable-diffusion-xl-v1-base"
    latent_channels: ClassVar[int] = 4
    pixels_per_latent: ClassVar[int] = 8
    resolution_step: ClassVar[int] = 32
    default_resolution: ClassVar[int] = 1024
    text_keys: ClassVar[tuple[str, ...]] = ("hidden_states", "pooled")
    ModelOptions: ClassVar[type] = ModelOptions

    def load(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Models:
        files = cast(ModelOptions, options)
        vae_dtype = torch.float32 if files.no_half_vae else dtype
        loaded = load_checkpoint(files.checkpoint, dtype=dtype, device=device, vae=files.vae, vae_dtype=vae_dtype)
        encoders = [loaded.text_encoder_1, loaded.text_encoder_2]
        vocabularies = find_vocabularies(files.checkpoint, files.tokenizer, files.tokenizer_cache_dir)
        return Models(
            denoiser=loaded.unet,
            text_encoders=encoders,
            tokenizers=text.build_tokenizers(vocabularies, encoders),
            vae=loaded.vae,
        )

    def noise_process(self) -> NoiseProcess:
        return DDPMProcess()

    def encode_images(self, vae: nn.Module, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents in float32: a sample of the posterior drawn with `generator`, or its mode without. `ValueError` on overflow."""
        with _weights_precision(vae):
            posterior = cast(Any, vae).encode(_like_weights(vae, pixels)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return _finite(vae, latents.float() * LATENT_SCALE, "latents")

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels in float32. `ValueError` on overflow."""
        with _weights_precision(vae):
            pixels = cast(Any, vae).decode(_like_weights(vae, latents / LATENT_SCALE)).sample
        return _finite(vae, pixels.float(), "pixels").clamp(-1, 1)

    def tokenize(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> Tokens:
        return text.tokenize(tokenizers, captions, cast(ModelOptions, options).tokens)

    def encode_text(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> TextStates:
        return text.encode_text(text_encoders, tokens)

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: TextStates, sizes: Sizes) -> Tensor:
        """One pass of the U-Net, in the precision of its inputs; the sizes stay whole numbers, since half precision would round them."""
        numbers = torch.cat([sizes.original, sizes.crop, sizes.target], dim=1).to(noisy.device)
        conditions = {"text_embeds": text["pooled"], "time_ids": numbers}
        return denoiser(noisy, timesteps.to(noisy.device), encoder_hidden_states=text["hidden_states"], added_cond_kwargs=conditions).sample

    def identity(self, options: Any) -> str:
        """A digest of the weights (see `sampled_file_hash`), the vocabularies, the caption length and the VAE's precision.

        Paths, names and dates do not count: caches move with their model.
        """
        files = cast(ModelOptions, options)
        vocabularies = find_vocabularies(files.checkpoint, files.tokenizer, files.tokenizer_cache_dir)
        weights = [*_weight_files(files.checkpoint), *(_weight_files(Path(files.vae)) if files.vae else ())]
        facts = [
            *map(sampled_file_hash, weights),
            *(repr(sorted(vocabulary.ids.items())) for vocabulary in vocabularies),
            str(files.tokens),
            str(files.no_half_vae),
        ]
        return hashlib.sha256("\n".join(facts).encode("utf-8")).hexdigest()

    def metadata(self, options: Any) -> dict[str, str]:
        """Names and hashes of the checkpoint and of a separate VAE (hashes of files only, not of folders), and the caption length."""
        files = cast(ModelOptions, options)
        table = {
            "ss_v2": "False",
            "ss_base_model_version": self.base_model_version,
            "ss_clip_skip": "None",
            "ss_max_token_length": str(files.tokens),
            "ss_sd_model_name": files.checkpoint.name,
            **_hashes(files.checkpoint, "sd_model"),
        }
        if files.vae:
            table |= {"ss_vae_name": Path(files.vae).name, **_hashes(Path(files.vae), "vae")}
        return table


ARCHITECTURE = SDXL()


def _weights_precision(vae: nn.Module) -> torch.autocast:
    """Autocast off: it would run a VAE kept in 32 bits in the half precision that overflows."""
    return torch.autocast(next(vae.parameters()).device.type, enabled=False)


def _like_weights(module: nn.Module, x: Tensor) -> Tensor:
    weight = next(module.parameters())
    return x.to(weight.device, weight.dtype)


def _finite(vae: nn.Module, x: Tensor, what: str) -> Tensor:
    if torch.isfinite(x).all():
        return x
    dtype = next(vae.parameters()).dtype
    advice = "give --no_half_vae" if dtype is torch.float16 else "its weights or what it was given are broken"
    raise ValueError(f"the VAE in {str(dtype).removeprefix('torch.')} gave {what} that are not finite: {advice}")


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: no such file, and no folder with safetensors files")
    return files


def _hashes(path: Path, what: str) -> dict[str, str]:
    return {f"ss_{what}_hash": short_file_hash(path), f"ss_new_{what}_hash": file_sha256(path)} if path.is_file() else {}
