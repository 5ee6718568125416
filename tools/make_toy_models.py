"""Make the small trained models of the demo from seeds: `python -m tools.make_toy_models sdxl --out assets`.

The training can be stopped and started again: what is done lies in the scratch folder. docs/toy_models.md says what the models hold
and what was measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from library.models.sdxl.checkpoint import single_file_state_dict
from tools.toy_denoiser import DenoiserTraining, encode_pictures, start_gently, train_denoiser
from tools.toy_sampling import grid, sample_and_score
from tools.toy_sdxl import ToyModels, build_models, save_tokenizer
from tools.toy_vae import DecoderTraining, VaeTraining, fold_scale, sharpen_decoder, train_vae


def main() -> None:
    """Train what the scratch folder does not hold yet, then write the single file and its tokenizer."""
    options = _parse()
    options.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    models = build_models(seed=0)
    make_vae(models, options.scratch)
    make_decoder(models, options.scratch)
    make_denoiser(models, options.scratch)
    save_configs(models, options.scratch)
    export(models, options.out)


def make_vae(models: ToyModels, scratch: Path) -> None:
    """Train the VAE and fold the scale of its latents, or read what an earlier run made."""
    path = scratch / "vae.safetensors"
    if not path.exists():
        report = train_vae(models.vae, VaeTraining(), scratch)
        fold_scale(models.vae)
        _save(models.vae, path)
        _note(scratch, "vae", report)
    _load(models.vae, path)


def make_decoder(models: ToyModels, scratch: Path) -> None:
    """Train the VAE's decoder further, or read what an earlier run made; the encoder and so the latents stay."""
    path = scratch / "vae_sharp.safetensors"
    if not path.exists():
        report = sharpen_decoder(models.vae, DecoderTraining(), scratch)
        _save(models.vae, path)
        _note(scratch, "decoder", report)
    _load(models.vae, path)


def make_denoiser(models: ToyModels, scratch: Path) -> None:
    """Train the U-Net and the text encoders, or read what an earlier run made."""
    parts = {name: module for name, module in models.modules().items() if name != "vae"}
    if not all((scratch / f"{name}.safetensors").exists() for name in parts):
        training = DenoiserTraining()
        start_gently(models)
        data = encode_pictures(models.vae, training.drawings, scratch / "latents.pt")
        report = train_denoiser(models, data, training, scratch, lambda current: _judge(current, scratch))
        score, _ = sample_and_score(models)
        _note(scratch, "denoiser", report | asdict(score))
        for name, module in parts.items():
            _save(module, scratch / f"{name}.safetensors")
    for name, module in parts.items():
        _load(module, scratch / f"{name}.safetensors")


def save_configs(models: ToyModels, scratch: Path) -> None:
    """Write each network's configuration beside its weights."""
    for name, module in models.modules().items():
        config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        (scratch / f"{name}.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="ascii")


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


def _save(module: torch.nn.Module, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)


def _load(module: torch.nn.Module, path: Path) -> None:
    module.load_state_dict(load_file(path))
    module.eval()


def _note(scratch: Path, part: str, report: dict[str, float]) -> None:
    (scratch / f"{part}_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="ascii")
    print(f"{part}: {report}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=["sdxl"], help="which toy model to make")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder of the finished model")
    parser.add_argument("--scratch", type=Path, default=Path("toy_scratch"), help="training state; a later run goes on from it")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
