"""The precision in which a VAE computes, whatever its family: that of its weights, and an error where that is too little."""

import torch
from torch import Tensor, nn

from library.models.outlines import is_outline


def weights_precision(vae: nn.Module) -> torch.autocast:
    """Autocast off: it would run a VAE kept in 32 bits in the half precision that overflows."""
    return torch.autocast(next(vae.parameters()).device.type, enabled=False)


def like_weights(vae: nn.Module, x: Tensor) -> Tensor:
    """`x` on the device and in the dtype of the VAE's weights."""
    weight = next(vae.parameters())
    return x.to(weight.device, weight.dtype)


def finite(vae: nn.Module, x: Tensor, what: str) -> Tensor:
    """`x`; raises `ValueError` where it holds infinities or no numbers, with the option that helps."""
    if is_outline(x) or torch.isfinite(x).all():
        return x
    dtype = next(vae.parameters()).dtype
    advice = "give --no_half_vae" if dtype is torch.float16 else "its weights or what it was given are broken"
    raise ValueError(f"the VAE in {str(dtype).removeprefix('torch.')} gave {what} that are not finite: {advice}")
