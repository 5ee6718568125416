"""Stable Diffusion XL: its facts, its files, and what its models do in a training step."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.core.file_hash import sampled_file_hash
from library.data.batch import Sizes, TextStates
from library.data.caches.npz import NpzLatents, NpzText
from library.diffusion.ddpm import DDPMOptions, DDPMProcess
from library.diffusion.process import NoiseProcess
from library.models.architecture import Architecture, Models, Tokens
from library.models.attention import set_attention
from library.models.digests import digest, hash_entries, model_files, part_hash
from library.models.filling import Component
from library.models.sdxl import npz, text
from library.models.sdxl.checkpoint import load_checkpoint, load_vae
from library.models.sdxl.components import TEXT_1, TEXT_2, VAE
from library.models.sdxl.configuration import LATENT_SCALE
from library.models.sdxl.folder import SUBFOLDERS
from library.models.sdxl.names import SDXLNaming
from library.models.sdxl.options import NOT_SDXL, GenerationFiles, ModelOptions
from library.models.sdxl.outline import sdxl_outline, vae_outline
from library.models.sdxl.vocabulary import find_vocabularies
from library.models.vae_pieces import decode_in_pieces, encode_in_pieces
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
    has_blocks: ClassVar[bool] = True
    ModelOptions: ClassVar[type] = ModelOptions
    NoiseOptions: ClassVar[type] = DDPMOptions
    GenerationFiles: ClassVar[type] = GenerationFiles
    refused: ClassVar[Mapping[str, str]] = NOT_SDXL

    def load(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Models:
        files = cast(ModelOptions, options)
        vae_dtype = torch.float32 if files.no_half_vae else dtype
        loaded = load_checkpoint(files.checkpoint, dtype=dtype, device=device, vae=files.vae, vae_dtype=vae_dtype, prediction=files)
        set_attention(loaded.unet, files.attention, files.split_attn)
        encoders = [loaded.text_encoder_1, loaded.text_encoder_2]
        vocabularies = find_vocabularies(files.checkpoint, files.tokenizer, files.tokenizer_cache_dir)
        return Models(
            denoiser=loaded.unet,
            text_encoders=encoders,
            tokenizers=text.build_tokenizers(vocabularies, encoders),
            vae=loaded.vae,
        )

    def outlined(self, options: Any = None) -> Models:
        files = cast(ModelOptions | None, options)
        checkpoint = files.checkpoint if files is not None and files.checkpoint.exists() else None
        unet, *encoders = sdxl_outline(checkpoint)
        other = Path(files.vae) if files is not None and files.vae else None
        vae = vae_outline(other if other is not None and other.exists() else checkpoint)
        return Models(denoiser=unet, text_encoders=encoders, tokenizers=[], vae=vae)

    def noise_process(self, options: Any = None, model_options: Any = None) -> NoiseProcess:
        return DDPMProcess(options, model_options)

    def encode_images(self, vae: nn.Module, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents in float32: a sample of the posterior drawn with `generator`, or its mode without. `ValueError` on overflow."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        def moments(pixels: Tensor) -> Tensor:
            return cast(Any, vae).encode(pixels).latent_dist.parameters

        with weights_precision(vae):
            posterior = DiagonalGaussianDistribution(encode_in_pieces(vae, like_weights(vae, pixels), moments, self.pixels_per_latent))
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return finite(vae, latents.float() * LATENT_SCALE, "latents")

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels in float32. `ValueError` on overflow."""

        def decode(latents: Tensor) -> Tensor:
            return cast(Any, vae).decode(latents).sample

        with weights_precision(vae):
            pixels = decode_in_pieces(vae, like_weights(vae, latents / LATENT_SCALE), decode, self.pixels_per_latent)
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

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Resnets and the transformer blocks of attention layers, in the order of the forward pass; samplers stand between them."""
        unet = cast(Any, denoiser)
        return [block for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) for block in _row(part)]

    def latents_identity(self, options: Any) -> str:
        """A digest of the VAE and its precision, whatever else its checkpoint holds, and whatever its name, place and date."""
        files = cast(ModelOptions, options)
        return digest([*_part_hashes(Path(files.vae) if files.vae else files.checkpoint, VAE), files.no_half_vae])

    def text_identity(self, options: Any) -> str:
        """A digest of the text encoders, the vocabularies, the caption length, and whether captions weigh their words."""
        files = cast(ModelOptions, options)
        weights = [found for part in (TEXT_1, TEXT_2) for found in _part_hashes(files.checkpoint, part)]  # a missing file is named
        vocabularies = find_vocabularies(files.checkpoint, files.tokenizer, files.tokenizer_cache_dir)
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


def _row(part: Any) -> Iterator[nn.Module]:
    """The resnets and transformer blocks of one part of the U-Net: a resnet, then the attention behind it, and so on."""
    for resnet, attention in zip_longest(part.resnets, getattr(part, "attentions", ())):
        yield resnet
        yield from () if attention is None else attention.transformer_blocks


def _part_hashes(path: Path, part: Component) -> list[str]:
    """Hashes of what one model is made of: its tensors in a single file, the files of its folder in diffusers layout."""
    if not path.is_dir():
        return [part_hash(path, part.prefix)]
    folder = path / SUBFOLDERS[part]
    return [*map(sampled_file_hash, model_files(folder if folder.is_dir() else path))]
