"""Stable Diffusion XL: its facts, its files, and what its models do in a training step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.core.file_hash import sampled_file_hash
from library.data.batch import Sizes, TextStates
from library.data.caches.npz import NpzLatents, NpzText
from library.diffusion.process import DDPMProcess, NoiseProcess, TimestepRange
from library.models.architecture import Architecture, Models, Tokens
from library.models.digests import digest, hash_entries, model_files, part_hash
from library.models.filling import Component
from library.models.sdxl import npz, text
from library.models.sdxl.checkpoint import load_checkpoint, load_vae
from library.models.sdxl.components import TEXT_1, TEXT_2, VAE
from library.models.sdxl.configuration import LATENT_SCALE
from library.models.sdxl.folder import SUBFOLDERS
from library.models.sdxl.names import SDXLNaming
from library.models.sdxl.options import NOT_SDXL, GenerationFiles, ModelOptions
from library.models.sdxl.vocabulary import find_vocabularies
from library.models.vae_precision import finite, like_weights, weights_precision


class SDXL(SDXLNaming, Architecture):
    """Stable Diffusion XL base and its fine-tunes (Podell et al. 2023)."""

    base_model_version: ClassVar[str] = "sdxl_base_v1-0"
    modelspec_architecture: ClassVar[str] = "stable-diffusion-xl-v1-base"
    modelspec_implementation: ClassVar[str] = "https://github.com/Stability-AI/generative-models"
    latent_channels: ClassVar[int] = 4
    pixels_per_latent: ClassVar[int] = 8
    resolution_step: ClassVar[int] = 32
    default_resolution: ClassVar[int] = 1024
    text_keys: ClassVar[tuple[str, ...]] = ("hidden_states", "pooled")
    ModelOptions: ClassVar[type] = ModelOptions
    NoiseOptions: ClassVar[type] = TimestepRange
    GenerationFiles: ClassVar[type] = GenerationFiles
    refused: ClassVar[Mapping[str, str]] = NOT_SDXL

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

    def noise_process(self, options: Any = None) -> NoiseProcess:
        return DDPMProcess(options)

    def encode_images(self, vae: nn.Module, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents in float32: a sample of the posterior drawn with `generator`, or its mode without. `ValueError` on overflow."""
        with weights_precision(vae):
            posterior = cast(Any, vae).encode(like_weights(vae, pixels)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return finite(vae, latents.float() * LATENT_SCALE, "latents")

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels in float32. `ValueError` on overflow."""
        with weights_precision(vae):
            pixels = cast(Any, vae).decode(like_weights(vae, latents / LATENT_SCALE)).sample
        return finite(vae, pixels.float(), "pixels").clamp(-1, 1)

    def tokenize(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> Tokens:
        files = cast(ModelOptions, options)
        return text.tokenize(tokenizers, captions, files.tokens, files.weighted_captions)

    def overlong(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> list[int]:
        files = cast(ModelOptions, options)
        return text.overlong(tokenizers, captions, files.tokens, files.weighted_captions)

    def encode_text(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> TextStates:
        return text.encode_text(text_encoders, tokens)

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: TextStates, sizes: Sizes) -> Tensor:
        """One pass of the U-Net, in the precision of its inputs; the sizes stay whole numbers, since half precision would round them."""
        numbers = torch.cat([sizes.original, sizes.crop, sizes.target], dim=1).to(noisy.device)
        conditions = {"text_embeds": text["pooled"], "time_ids": numbers}
        return denoiser(noisy, timesteps.to(noisy.device), encoder_hidden_states=text["hidden_states"], added_cond_kwargs=conditions).sample

    def latents_identity(self, options: Any) -> str:
        """A digest of the VAE and its precision, whatever else its checkpoint holds, and whatever its name, place and date."""
        files = cast(ModelOptions, options)
        return digest([*_part_hashes(Path(files.vae) if files.vae else files.checkpoint, VAE), files.no_half_vae])

    def text_identity(self, options: Any) -> str:
        """A digest of the text encoders, the vocabularies, the caption length, and whether captions weigh their words."""
        files = cast(ModelOptions, options)
        vocabularies = find_vocabularies(files.checkpoint, files.tokenizer, files.tokenizer_cache_dir)
        weights = (found for part in (TEXT_1, TEXT_2) for found in _part_hashes(files.checkpoint, part))
        ids = (sorted(vocabulary.ids.items()) for vocabulary in vocabularies)
        return digest([*weights, *ids, files.tokens, files.weighted_captions])

    def load_vae(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The VAE of the checkpoint, or the one given with `--vae`."""
        files = cast(ModelOptions, options)
        return load_vae(files.vae or files.checkpoint, dtype=torch.float32 if files.no_half_vae else dtype, device=device)

    def npz_latents(self) -> NpzLatents:
        """sd-scripts stores latents as the VAE gives them, without the scale."""
        return NpzLatents(suffix="_sdxl.npz", channels=self.latent_channels, pixels=self.pixels_per_latent, ready=scaled)

    def npz_text(self, text_encoders: Sequence[nn.Module], options: Any) -> NpzText | None:
        files = cast(ModelOptions, options)
        if files.weighted_captions:  # nothing in such a file says how its words were weighed
            return None
        first, second = (cast(Any, encoder) for encoder in text_encoders)
        widths = first.config.hidden_size, second.config.hidden_size
        return npz.text_files(files.tokens + 2, widths, second.text_projection.weight)

    def metadata(self, options: Any) -> dict[str, str]:
        """Names and hashes of the checkpoint and of a separate VAE (hashes of files only, not of folders), and the caption length."""
        files = cast(ModelOptions, options)
        table = {
            "ss_v2": "False",
            "ss_base_model_version": self.base_model_version,
            "ss_clip_skip": "None",
            "ss_max_token_length": str(files.tokens),
            "ss_sd_model_name": files.checkpoint.name,
            **hash_entries(files.checkpoint, "sd_model"),
        }
        if files.vae:
            table |= {"ss_vae_name": Path(files.vae).name, **hash_entries(Path(files.vae), "vae")}
        return table


ARCHITECTURE = SDXL()


def scaled(latents: Tensor) -> Tensor:
    """Latents as the U-Net sees them."""
    return latents * LATENT_SCALE


def _part_hashes(path: Path, part: Component) -> list[str]:
    """Hashes of what one model is made of: its tensors in a single file, the files of its folder in diffusers layout."""
    if not path.is_dir():
        return [part_hash(path, part.prefix)]
    folder = path / SUBFOLDERS[part]
    return [*map(sampled_file_hash, model_files(folder if folder.is_dir() else path))]
