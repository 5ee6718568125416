"""Anima's VAE on single images: the layers of `AutoencoderKLQwenImage`, walked with two-dimensional convolutions.

It is a video model. Its convolutions are causal in time and pad the past with zeros, so of a lone first frame only the last slice of each
kernel in time sees anything: `conv3d(x) == conv2d(x[:, :, 0], weight[:, :, -1])`, exactly, at a third of the products. The resampling in
time does nothing to a first frame. Norms act on each position alone, so all but the attention can be computed in chunks of rows.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.models.vae_pieces import decode_in_pieces, encode_in_pieces
from library.models.vae_precision import finite, like_weights, weights_precision

PIXELS_PER_LATENT = 8
SMALLEST = 1e-12  # length of a position's channels, so that zeros stay zeros


def encode_pixels(vae: nn.Module, pixels: Tensor, generator: torch.Generator | None = None, chunk: int | None = None) -> Tensor:
    """Latents (batch, 16, height/8, width/8) in float32, normalised, of pixels (batch, 3, height, width) in [-1, 1].

    The mode of the posterior, or a sample of it drawn with `generator`. `chunk` computes so many rows of a convolution's output at a
    time, which takes less memory and changes nothing else. Raises `ValueError` for sides that are no multiples of 8 and on overflow.
    """
    height, width = pixels.shape[-2:]
    if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
        raise ValueError(f"an image of {width}x{height} pixels: the VAE needs multiples of {PIXELS_PER_LATENT}")
    model = cast(Any, vae)

    def encode(pixels: Tensor) -> Tensor:
        return _conv(model.quant_conv, _encoder(model.encoder, pixels, chunk), None)

    with weights_precision(vae):
        moments = encode_in_pieces(vae, like_weights(vae, pixels), encode, PIXELS_PER_LATENT).float()
    mean, log_variance = moments.chunk(2, dim=1)
    if generator is not None:
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
    center, spread = _normalisation(model, mean.device)
    return finite(vae, (mean - center) / spread, "latents")


def decode_latents(vae: nn.Module, latents: Tensor, chunk: int | None = None) -> Tensor:
    """Pixels (batch, 3, height, width) in [-1, 1], float32, of normalised latents; `chunk` as for `encode_pixels`."""
    model = cast(Any, vae)
    center, spread = _normalisation(model, latents.device)
    x = like_weights(vae, latents.float() * spread + center)

    def decode(latents: Tensor) -> Tensor:
        return _decoder(model.decoder, _conv(model.post_quant_conv, latents, None), chunk)

    with weights_precision(vae):
        pixels = decode_in_pieces(vae, x, decode, PIXELS_PER_LATENT)
    return finite(vae, pixels.float(), "pixels").clamp(-1, 1)


# The two halves


def _encoder(encoder: Any, x: Tensor, chunk: int | None) -> Tensor:
    x = _conv(encoder.conv_in, x, chunk)
    for layer in encoder.down_blocks:
        x = _layer(layer, x, chunk)
    x = _middle(encoder.mid_block, x, chunk)
    return _conv(encoder.conv_out, x, chunk, _activated(encoder.norm_out))


def _decoder(decoder: Any, x: Tensor, chunk: int | None) -> Tensor:
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, x, chunk), chunk)
    for block in decoder.up_blocks:
        for layer in (*block.resnets, *(block.upsamplers or ())):
            x = _layer(layer, x, chunk)
    return _conv(decoder.conv_out, x, chunk, _activated(decoder.norm_out))


def _middle(block: Any, x: Tensor, chunk: int | None) -> Tensor:
    x = _layer(block.resnets[0], x, chunk)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _layer(resnet, _attention(attention, x, chunk), chunk)
    return x


def _layer(layer: Any, x: Tensor, chunk: int | None) -> Tensor:
    if hasattr(layer, "conv1"):
        return _resnet(layer, x, chunk)
    if hasattr(layer, "to_qkv"):
        return _attention(layer, x, chunk)
    return _resample(layer, x, chunk)


# Layers


def _resnet(block: Any, x: Tensor, chunk: int | None) -> Tensor:
    inner = _conv(block.conv1, x, chunk, _activated(block.norm1))
    inner = _conv(block.conv2, inner, chunk, _activated(block.norm2))
    inner += x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x, chunk)
    return inner


def _resample(block: Any, x: Tensor, chunk: int | None) -> Tensor:
    """Twice the side by repeating each position, or half of it by a stride of two over one more row and column; then a convolution."""
    before, conv = block.resample
    if isinstance(before, nn.ZeroPad2d):
        return _conv(conv, x, chunk)
    return _conv(conv, x, chunk, lambda rows: functional.interpolate(rows, scale_factor=2, mode="nearest"), scale=2)


def _attention(block: Any, x: Tensor, chunk: int | None) -> Tensor:
    batch, channels, height, width = x.shape
    query, key, value = block.to_qkv(_norm(block.norm, x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
    parts = [functional.scaled_dot_product_attention(part, key, value) for part in query.split((chunk or height) * width, dim=2)]
    seen = torch.cat(parts, dim=2).squeeze(1).transpose(1, 2).reshape(batch, channels, height, width)
    return x + block.proj(seen)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """Each position's channels at length sqrt(channels), times gamma; computed in float32, rounded once."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(SMALLEST)
    return (x / length * (norm.gamma.float() * norm.scale).reshape(-1, 1, 1)).to(x.dtype)


def _activated(norm: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.silu(_norm(norm, x), inplace=True)


def _conv(conv: Any, x: Tensor, chunk: int | None, before: Callable[[Tensor], Tensor] | None = None, scale: int = 1) -> Tensor:
    """The convolution of `before(x)`, which has `scale` rows for each of x; `chunk` rows of the output at a time.

    A stride of one pads both sides alike; a stride of two only below and on the right, by one.
    """
    weight = conv.weight if conv.weight.dim() == 4 else conv.weight[:, :, -1]
    kernel, stride = weight.shape[-1], conv.stride[-1]
    first, last = (0, 1) if stride == 2 else (kernel // 2, kernel // 2)
    height = x.shape[-2] * scale
    rows = height // stride

    def some(start: int, stop: int) -> Tensor:
        """The output's rows from `start` up to `stop`."""
        top, bottom = start * stride - first, (stop - 1) * stride - first + kernel
        inside, outside = max(top, 0) // scale, -(-min(bottom, height) // scale)
        seen = x[..., inside:outside, :] if before is None else before(x[..., inside:outside, :])
        offset = max(top, 0) - inside * scale
        seen = seen[..., offset : offset + min(bottom, height) - max(top, 0), :]
        above, below = max(0, -top), max(0, bottom - height)
        if first == last and above == below:
            return functional.conv2d(seen, weight, conv.bias, stride, (above, first))
        return functional.conv2d(functional.pad(seen, (first, last, above, below)), weight, conv.bias, stride)

    if chunk is None or chunk >= rows:
        return some(0, rows)
    output = x.new_empty((len(x), len(weight), rows, x.shape[-1] * scale // stride))
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        output[..., start:stop, :] = some(start, stop)
    return output


# Numbers


def _normalisation(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels, (1, channels, 1, 1)."""
    facts = (vae.config.latents_mean, vae.config.latents_std)
    center, spread = (torch.tensor(fact, dtype=torch.float32, device=device).reshape(1, -1, 1, 1) for fact in facts)
    return center, spread
