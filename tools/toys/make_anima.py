"""The making of the toy Anima, step by step; `python -m tools.make_toy_models anima --out assets` runs it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.models.anima.checkpoint import denoiser_state_dict, text_encoder_state_dict, vae_state_dict
from library.models.anima.vae import encode_pixels
from tools.toys.anima import ToyAnima, build_anima
from tools.toys.anima_denoiser import AnimaTraining, start_gently, train_anima
from tools.toys.anima_sampling import sample_and_score
from tools.toys.anima_vae import AnimaVaeTraining, fold_scale, train_anima_vae
from tools.toys.anima_words import save_tokenizers
from tools.toys.captions import encode_pictures
from tools.toys.sdxl_sampling import grid
from tools.toys.training import load_module, note, save_configs, save_module


def make_anima(out: Path, scratch: Path) -> None:
    """Train what the scratch folder does not hold yet, then write the three files and both tokenizers to `toy_anima/` in `out`."""
    models = build_anima(scratch, seed=0)
    make_vae(models, scratch)
    make_denoiser(models, scratch)
    save_configs(models.modules(), scratch)
    export(models, out / "toy_anima")


def make_vae(models: ToyAnima, scratch: Path) -> None:
    """Train the VAE and fold the scale of its latents, or read what an earlier run made."""
    path = scratch / "anima_vae.safetensors"
    if not path.exists():
        report = train_anima_vae(models.vae, AnimaVaeTraining(), scratch)
        fold_scale(models.vae)
        save_module(models.vae, path)
        note(scratch, "anima_vae", report)
    load_module(models.vae, path)


def make_denoiser(models: ToyAnima, scratch: Path) -> None:
    """Train the transformer, the text conditioner and the text encoder, or read what an earlier run made."""
    parts = {name: module for name, module in models.modules().items() if name != "anima_vae"}
    if not all((scratch / f"{name}.safetensors").exists() for name in parts):
        training = AnimaTraining()
        start_gently(models)
        data = encode_pictures(lambda pixels: _encode(models, pixels), training.drawings, scratch / "anima_latents.pt")
        report = train_anima(models, data, training, scratch, lambda current: _judge(current, scratch))
        score, _ = sample_and_score(models)
        note(scratch, "anima_denoiser", report | asdict(score))
        for name, module in parts.items():
            save_module(module, scratch / f"{name}.safetensors")
    for name, module in parts.items():
        load_module(module, scratch / f"{name}.safetensors")


def export(models: ToyAnima, folder: Path) -> None:
    """Write the files of the three models in their original layouts, in half precision, and the tokenizers beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    denoiser = nn.ModuleDict({"transformer": models.transformer, "text_conditioner": models.conditioner})
    files = {
        "dit": denoiser_state_dict(denoiser, torch.float16),
        "qwen3": text_encoder_state_dict(models.encoder, torch.float16),
        "vae": vae_state_dict(models.vae, torch.float16),
    }
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        save_file(tensors, path, metadata={"format": "pt", "modelspec.title": f"Toy Anima, {name}", "modelspec.license": "Apache-2.0"})
        path.chmod(0o644)
        print(f"wrote {path}: {path.stat().st_size} bytes, {len(tensors)} tensors")
    save_tokenizers(folder)


@torch.no_grad()
def _encode(models: ToyAnima, pixels: Tensor) -> Tensor:
    return encode_pixels(models.vae, pixels)


def _judge(models: ToyAnima, scratch: Path) -> str:
    score, images = sample_and_score(models)
    grid(images).save(scratch / "anima_samples.png")
    return str(score)
