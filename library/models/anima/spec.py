"""Anima: its facts, its files, and what its models do in a training step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.core.file_hash import sampled_file_hash
from library.data.batch import Sizes, TextStates
from library.data.caches.npz import NpzLatents, NpzText, identical
from library.diffusion.flow import FlowOptions, FlowProcess
from library.diffusion.process import NoiseProcess
from library.models.anima import npz, text
from library.models.anima.checkpoint import (
    check_files,
    find_denoiser,
    find_text_encoder,
    find_vae,
    load_denoiser,
    load_text_encoder,
    load_vae,
    plan_all,
)
from library.models.anima.denoiser import AnimaDiT
from library.models.anima.names import AnimaNaming
from library.models.anima.options import NOT_ANIMA, GenerationFiles, ModelOptions
from library.models.anima.outline import full_size
from library.models.anima.tokenizers import check_sizes, find_tokenizers
from library.models.anima.vae import decode_latents, encode_pixels
from library.models.architecture import Architecture, Models, Tokens
from library.models.attention import set_attention
from library.models.digests import digest, hash_entries, model_files

CONDITIONING = "conditioning"


class Anima(AnimaNaming, Architecture):
    """Anima (CircleStone Labs 2026): Cosmos-Predict2's 2B transformer, Qwen3-0.6B text through an adapter, the Qwen-Image VAE."""

    base_model_version: ClassVar[str] = "anima"
    modelspec_architecture: ClassVar[str] = "anima-preview"
    modelspec_implementation: ClassVar[str] = "https://huggingface.co/circlestone-labs/Anima"
    latent_channels: ClassVar[int] = 16
    pixels_per_latent: ClassVar[int] = 8
    resolution_step: ClassVar[int] = 16
    longest_side: ClassVar[int | None] = 4096
    default_resolution: ClassVar[int] = 1024
    text_keys: ClassVar[tuple[str, ...]] = ("hidden_states", "mask", "t5_ids", "t5_mask")
    has_blocks: ClassVar[bool] = True
    ModelOptions: ClassVar[type] = ModelOptions
    NoiseOptions: ClassVar[type] = FlowOptions
    GenerationFiles: ClassVar[type] = GenerationFiles
    refused: ClassVar[Mapping[str, str]] = NOT_ANIMA

    def load(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> Models:
        files = cast(ModelOptions, options)
        check_files(files.dit, files.text_encoder, files.vae_path, _path(files.llm_adapter_path))
        encoders, tokenizers = self.load_text(options, device=device, dtype=dtype)
        denoiser = self.load_denoiser(options, device=device, dtype=dtype)
        self.check_fit(encoders, tokenizers, denoiser)
        vae = self.load_vae(options, device=device, dtype=dtype)
        return Models(denoiser=denoiser, text_encoders=encoders, tokenizers=tokenizers, vae=vae)

    def load_text(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> tuple[list[nn.Module], list[Any]]:
        """The text encoder and both tokenizers. Raises `ValueError` as `load` does."""
        files = cast(ModelOptions, options)
        tokenizers = _tokenizers(files)
        return [load_text_encoder(files.text_encoder, device=device, dtype=dtype)], tokenizers

    def load_denoiser(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> AnimaDiT:
        """The denoiser, with the attention that the options ask for. Raises `ValueError` as `load` does."""
        files = cast(ModelOptions, options)
        denoiser = load_denoiser(files.dit, device=device, dtype=dtype, llm_adapter=_path(files.llm_adapter_path))
        set_attention(denoiser, files.attention, files.split_attn)
        return denoiser

    def check_fit(self, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any], denoiser: nn.Module) -> None:
        """Raise `ValueError` for tokenizers of another vocabulary than the models embed."""
        rows = cast(AnimaDiT, denoiser).text_conditioner.embed.num_embeddings
        check_sizes(tokenizers, cast(Any, text_encoders[0]).config.vocab_size, rows)

    def load_vae(self, options: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The VAE. Raises `ValueError` as `load` does."""
        files = cast(ModelOptions, options)
        vae = load_vae(files.vae_path, device=device, dtype=torch.float32 if files.no_half_vae else dtype)
        cast(Any, vae).rows_at_a_time = files.vae_chunk_size
        return vae

    def outlined(self, options: Any = None) -> Models:
        files = cast(ModelOptions | None, options)
        if files is None or not files.dit.exists():
            transformer, conditioner, encoder, vae = full_size()
        else:
            found = [*find_denoiser(files.dit, _path(files.llm_adapter_path)), find_text_encoder(files.text_encoder)]
            plans = plan_all([*found, find_vae(files.vae_path)])
            transformer, conditioner, encoder, vae = (planned.module for planned in plans)
        denoiser = AnimaDiT(cast(Any, transformer), cast(Any, conditioner))
        cast(Any, vae).rows_at_a_time = None if files is None else files.vae_chunk_size
        return Models(denoiser=denoiser, text_encoders=[encoder], tokenizers=[], vae=vae)

    def noise_process(self, options: Any = None, model_options: Any = None) -> NoiseProcess:
        return FlowProcess(options)

    def encode_images(self, vae: nn.Module, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normalised latents in float32: the mode of the posterior, or a sample of it with `generator`. `ValueError` on overflow."""
        return encode_pixels(vae, pixels, generator, _chunk(vae))

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pixels in float32. `ValueError` on overflow."""
        return decode_latents(vae, latents, _chunk(vae))

    def tokenize(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> Tokens:
        files = cast(ModelOptions, options)
        return text.tokenize(tokenizers, captions, files.qwen3_max_token_length, files.t5_max_token_length)

    def overlong(self, tokenizers: Sequence[Any], captions: Sequence[str], options: Any) -> list[int]:
        files = cast(ModelOptions, options)
        return text.overlong(tokenizers, captions, files.qwen3_max_token_length, files.t5_max_token_length)

    def encode_text(self, text_encoders: Sequence[nn.Module], tokens: Tokens) -> TextStates:
        return text.encode_text(text_encoders[0], tokens)

    def conditioned(self, denoiser: nn.Module, text: TextStates) -> TextStates:
        """The states that the LLM adapter makes, (batch, 512 or more, width)."""
        return {CONDITIONING: cast(AnimaDiT, denoiser).condition(*(text[key] for key in self.text_keys))}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, text: TextStates, sizes: Sizes) -> Tensor:
        """The velocity in float32. Anima knows no sizes."""
        conditioning = text if CONDITIONING in text else self.conditioned(denoiser, text)
        return denoiser(noisy, timesteps.to(noisy.device), conditioning[CONDITIONING])

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return cast(AnimaDiT, denoiser).blocks()

    def latents_identity(self, options: Any) -> str:
        """A digest of the VAE (see `sampled_file_hash`) and its precision, whatever its name, place and date."""
        files = cast(ModelOptions, options)
        return digest([*map(sampled_file_hash, model_files(files.vae_path)), files.no_half_vae])

    def text_identity(self, options: Any) -> str:
        """A digest of the text encoder, the tokenizers and the caption lengths.

        The DiT does not count, though its adapter reads the text: nothing that is cached passes through it.
        """
        files = cast(ModelOptions, options)
        weights = [sampled_file_hash(file) for file in model_files(files.text_encoder)]  # first, for it names a file that is missing
        tokenizers = (tokenizer.backend.to_str() for tokenizer in _tokenizers(files))
        return digest([*weights, *tokenizers, files.qwen3_max_token_length, files.t5_max_token_length])

    def npz_latents(self) -> NpzLatents:
        return NpzLatents(suffix="_anima.npz", channels=self.latent_channels, pixels=self.pixels_per_latent, ready=identical)

    def npz_text(self, text_encoders: Sequence[nn.Module], options: Any) -> NpzText:
        files = cast(ModelOptions, options)
        width = cast(Any, text_encoders[0]).config.hidden_size
        return npz.text_files(files.qwen3_max_token_length, files.t5_max_token_length, width)

    def metadata(self, options: Any) -> dict[str, str]:
        """Names and hashes of the DiT and the VAE (hashes of files only, not of folders), and the caption length."""
        files = cast(ModelOptions, options)
        return {
            "ss_v2": "False",
            "ss_base_model_version": self.base_model_version,
            "ss_clip_skip": "None",
            "ss_max_token_length": str(files.qwen3_max_token_length),
            "ss_sd_model_name": files.dit.name,
            **hash_entries(files.dit, "sd_model"),
            "ss_vae_name": files.vae_path.name,
            **hash_entries(files.vae_path, "vae"),
        }


ARCHITECTURE = Anima()


def _tokenizers(files: ModelOptions) -> list[Any]:
    given, cache = _path(files.t5_tokenizer_path), _path(files.tokenizer_cache_dir)
    return find_tokenizers(files.text_encoder, given, files.dit, qwen_tokenizer=_path(files.qwen3_tokenizer_path), cache=cache)


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)


def _chunk(vae: nn.Module) -> int | None:
    return getattr(vae, "rows_at_a_time", None)
