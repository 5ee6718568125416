"""Training of the toy Anima's transformer, text conditioner and text encoder, together and from scratch, by flow matching."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.models.anima.text import LENGTH, encode_text, tokenize
from tools.toys.anima import ToyAnima
from tools.toys.captions import CaptionedLatents
from tools.toys.training import Average, Run, warm_cosine, warm_hold_fall

Text = tuple[Tensor, Tensor]
"""What the transformer sees of captions, (captions, tokens + 1, width), and the biases of its attention to them."""


@dataclass(kw_only=True, frozen=True)
class AnimaTraining:
    """How the transformer, the text conditioner and the text encoder are trained."""

    steps: int = 3200
    captions: int = 32
    latents_per_caption: int = 2
    learning_rate: float = 1.5e-3
    text_learning_rate: float = 1e-3
    warm_up: int = 60
    fall: int = 1000
    again: int = 800  # the last steps, in which the rate falls a second time, from a part of what it was
    again_rate: float = 0.6
    ema: float = 0.997
    caption_dropout: float = 0.1
    drawings: int = 12
    seed: int = 12
    log_every: int = 50
    save_every: int = 250


@torch.no_grad()
def start_gently(models: ToyAnima) -> None:
    """Let the velocity and every residual branch start at zero, and let the attention to words find them.

    A prompt is filled up to 512 tokens with zeros, which the transformer sees too: keys of length 1 would hardly stand out from these.
    """
    transformer = models.transformer
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.time_embed.t_embedder.linear_2.weight)
    for name, module in transformer.named_modules():
        if name.split(".")[-1] in {"norm1", "norm2", "norm3", "norm_out"}:
            nn.init.zeros_(module.linear_2.weight)
        if name.endswith(("attn2.norm_q", "attn2.norm_k")):
            module.weight.fill_(1.7)


def train_anima(
    models: ToyAnima, data: CaptionedLatents, training: AnimaTraining, scratch: Path, judge: Callable[[ToyAnima], str]
) -> dict[str, float]:
    """Train in place, resuming from the scratch folder, and leave the averaged weights in the models; returns steps, loss and seconds."""
    texts = nn.ModuleList([models.conditioner, models.encoder])
    trained = nn.ModuleDict({"transformer": models.transformer, "texts": texts}).train()
    average = Average(trained, training.ema)
    groups = [
        {"params": list(models.transformer.parameters()), "top": training.learning_rate},
        {"params": list(texts.parameters()), "top": training.text_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    run = Run(path=scratch / "anima_run.pt", networks=nn.ModuleDict({"trained": trained, "average": average}), optimizer=optimizer)
    run.resume()
    while run.step < training.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * _rate(training, run.step)
        run.note(_step(models, data, training, optimizer, run.step))
        average.follow(trained, run.step - 1)
        if run.step % training.log_every == 0:
            print(f"anima step {run.step}/{training.steps} loss {run.loss:.4f} {run.elapsed():.0f} s", flush=True)
        if run.step % training.save_every == 0 or run.step == training.steps:
            run.save()
            with average.standing_in(trained):
                print(f"anima step {run.step} {judge(models)}", flush=True)
    average.put_into(trained)
    return {"steps": run.step, "loss": run.loss, "seconds": run.elapsed()}


def read_captions(models: ToyAnima, captions: list[str]) -> Text:
    """The captions as the transformer sees them, in fewer rows.

    Anima fills them up to 512 rows with zeros. Rows of zeros have the same key and value, so one row whose bias is the logarithm of
    their number stands for all.
    """
    tokens = tokenize(models.tokenizers, captions, 64, 64)
    longest = {name: max(1, int(tokens[f"{name}_mask"].sum(1).max())) for name in ("qwen", "t5")}
    states = encode_text(models.encoder, {key: value[:, : longest[key.split("_")[0]]] for key, value in tokens.items()})
    rows = models.conditioner(states["hidden_states"], states["t5_ids"], states["t5_mask"], states["mask"])[:, : longest["t5"] + 1]
    bias = torch.zeros(rows.shape[:2])
    bias[:, -1] = math.log(LENGTH - longest["t5"])
    return rows, bias


def velocity(models: ToyAnima, noisy: Tensor, times: Tensor, text: Text) -> Tensor:
    """The velocity (batch, 16, height, width) from latents to noise, at times (batch,) in 0 to 1."""
    rows, bias = text
    masked = F.pad(noisy, (0, 0, 0, 0, 0, 1))[:, :, None]  # the padding mask: nothing is padding
    return models.transformer(masked, times, rows, attention_mask=bias).sample[:, :, 0]


def flow_loss(models: ToyAnima, latents: Tensor, text: Text, rng: np.random.Generator) -> Tensor:
    """The mean squared error of the predicted velocity, at times spread evenly over the batch."""
    count = len(latents)
    times = torch.from_numpy((rng.permutation(count) + rng.random(count)) / count).float()
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    s = times[:, None, None, None]
    return F.mse_loss(velocity(models, (1 - s) * latents + s * noise, times, text), noise - latents)


def _rate(training: AnimaTraining, step: int) -> float:
    """The factor of the learning rate: it falls to zero twice."""
    first = training.steps - training.again
    if step < first:
        return warm_hold_fall(step, first, training.warm_up, training.fall)
    return training.again_rate * warm_cosine(step - first, training.again, 1)


def _step(models: ToyAnima, data: CaptionedLatents, training: AnimaTraining, optimizer: torch.optim.Optimizer, step: int) -> float:
    rng = np.random.default_rng((training.seed, step))
    captions, latents = data.batch(rng, training.captions, training.latents_per_caption, training.caption_dropout)
    rows, bias = read_captions(models, captions)
    each = training.latents_per_caption
    loss = flow_loss(models, latents, (rows.repeat_interleave(each, 0), bias.repeat_interleave(each, 0)), rng)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
