"""The steps that make the toy SDXL, each resumed from the scratch folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from library.models.sdxl.checkpoint import single_file_state_dict
from tools.toys.captions import encode_pictures
from tools.toys.sdxl import ToyModels, build_models, save_tokenizer
from tools.toys.sdxl_denoiser import DenoiserTraining, start_gently, train_denoiser
from tools.toys.sdxl_sampling import grid, sample_and_score
from tools.toys.sdxl_vae import DecoderTraining, VaeTraining, encode, fold_scale, sharpen_decoder, train_vae
from tools.toys.training import load_module, note, save_configs, save_module


def make_sdxl(out: Path, scratch: Path) -> None:
    """The toy SDXL: one file and its tokenizer."""
    models = build_models(seed=0)
    make_vae(models, scratch)
    make_decoder(models, scratch)
    make_denoiser(models, scratch)
    save_configs(models.modules(), scratch)
    export(models, out)


def make_vae(models: ToyModels, scratch: Path) -> None:
    """Train the VAE and fold the scale of its latents, or read what an earlier run made."""
    path = scratch / "vae.safetensors"
    if not path.exists():
        report = train_vae(models.vae, VaeTraining(), scratch)
        fold_scale(models.vae)
        save_module(models.vae, path)
        note(scratch, "vae", report)
    load_module(models.vae, path)


def make_decoder(models: ToyModels, scratch: Path) -> None:
    """Train the VAE's decoder further, or read what an earlier run made; the encoder and so the latents stay."""
    path = scratch / "vae_sharp.safetensors"
    if not path.exists():
        report = sharpen_decoder(models.vae, DecoderTraining(), scratch)
        save_module(models.vae, path)
        note(scratch, "decoder", report)
    load_module(models.vae, path)


def make_denoiser(models: ToyModels, scratch: Path) -> None:
    """Train the U-Net and the text encoders, or read what an earlier run made."""
    parts = {name: module for name, module in models.modules().items() if name != "vae"}
    if not all((scratch / f"{name}.safetensors").exists() for name in parts):
        training = DenoiserTraining()
        start_gently(models)
        data = encode_pictures(lambda pixels: encode(models.vae, pixels), training.drawings, scratch / "latents.pt")
        report = train_denoiser(models, data, training, scratch, lambda current: _judge(current, scratch))
        score, _ = sample_and_score(models)
        note(scratch, "denoiser", report | asdict(score))
        for name, module in parts.items():
            save_module(module, scratch / f"{name}.safetensors")
    for name, module in parts.items():
        load_module(module, scratch / f"{name}.safetensors")


def export(models: ToyModels, out: Path) -> None:
    """Write the single file in SDXL's original layout, in half precision, and the tokenizer beside it."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = single_file_state_dict(models.unet, models.vae, models.text_1, models.text_2, dtype=torch.float16)
    metadata = {"format": "pt", "modelspec.title": "Toy SDXL", "modelspec.license": "Apache-2.0"}
    save_file(tensors, out / "toy_sdxl.safetensors", metadata=metadata)
    (out / "toy_sdxl.safetensors").chmod(0o644)
    save_tokenizer(out / "toy_sdxl.tokenizer")
    print(f"wrote {out / 'toy_sdxl.safetensors'}: {(out / 'toy_sdxl.safetensors').stat().st_size} bytes, {len(tensors)} tensors")


def _judge(models: ToyModels, scratch: Path) -> str:
    score, images = sample_and_score(models)
    grid(images).save(scratch / "samples.png")
    return str(score)
