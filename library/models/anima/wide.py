"""The few places of Anima's transformer that compute in float32 whatever the weights are kept in.

Half precision rounds the time, the adaptive norms and the residual stream, and fp16 overflows in the last (sd-scripts #2302). These
modules take the place of diffusers' own and keep their children's names, so weights and adapters find their layers as before.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.core.devices import autocast_dtype


class WideLinear(nn.Linear):
    """A Linear that computes in the precision of its input: autocast does not narrow it, and its weight is cast for each use."""

    keeps_dtype: ClassVar[bool] = True  # for packed weights, which take this layer's place: see `library/core/quantised.py`

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of `input`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if autocast_dtype(input.device) is None:
            return F.linear(input, self.weight.to(input.dtype), bias)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, self.weight.to(input.dtype), bias)


class WideRMSNorm(nn.RMSNorm):
    """An RMS norm in the precision of its input, whose weight is cast for each use: one fused operation where torch has it."""

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = tuple(layer.weight.shape), layer.eps, True
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width) in the dtype of `x`."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Modulation(nn.Module):
    """An adaptive layer norm: shift and scale of the normed stream, and a gate where the layer it replaces gives one.

    Computed in float32; what goes on to the next products is cast to their dtype once.
    """

    def __init__(self, layer: Any, *, has_gate: bool) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = WideLinear(layer.linear_1), WideLinear(layer.linear_2)
        self.has_gate = has_gate

    def forward(self, stream: Tensor, time: Tensor, shifts: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Modulated (batch, tokens, width), with the gate (batch, 1, width) in the dtype of `stream`.

        `time` (batch, width) and `shifts` (batch, 3 * width) are what the time embedding gives.
        """
        changes = self.linear_2(self.linear_1(F.silu(time)))
        changes = (changes + shifts[:, : changes.shape[-1]]).unsqueeze(1)
        shift, scale, *gate = changes.chunk(3 if self.has_gate else 2, dim=-1)
        normed = F.layer_norm(stream, stream.shape[-1:], eps=1e-6)
        modulated = torch.addcmul(shift, normed, 1 + scale)
        return (modulated.to(autocast_dtype(stream.device) or stream.dtype), gate[0]) if gate else modulated


class TimeEmbedding(nn.Module):
    """What the adaptive norms know of the time, in float32."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.time_proj, self.t_embedder, self.norm = layer.time_proj, layer.t_embedder, WideRMSNorm(layer.norm)
        for name in ("linear_1", "linear_2"):
            setattr(self.t_embedder, name, WideLinear(getattr(self.t_embedder, name)))

    def forward(self, stream: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 3 * width) and (batch, width) in the dtype of `stream` for times (batch,) in [0, 1]."""
        waves = self.time_proj(times).to(stream.dtype)
        return self.t_embedder(waves), self.norm(waves)


def widen_transformer(transformer: Any) -> None:
    """Put these modules into a `CosmosTransformer3DModel`; the parameters stay the same objects under the same names."""
    transformer.patch_embed.proj = WideLinear(transformer.patch_embed.proj)
    transformer.time_embed = TimeEmbedding(transformer.time_embed)
    for block in transformer.transformer_blocks:
        for name in ("norm1", "norm2", "norm3"):
            setattr(block, name, Modulation(getattr(block, name), has_gate=True))
    transformer.norm_out = Modulation(transformer.norm_out, has_gate=False)
    transformer.proj_out = WideLinear(transformer.proj_out)
    _widen_norms(transformer)


def widen_conditioner(conditioner: nn.Module) -> None:
    """Let the norms of an `AnimaTextConditioner` take a float32 stream; the parameters stay the same objects under the same names."""
    _widen_norms(conditioner)


def _widen_norms(model: nn.Module) -> None:
    norms = [(path, module) for path, module in model.named_modules() if type(module).__name__ == "RMSNorm"]
    for path, norm in norms:  # torch's own, or diffusers'
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, WideRMSNorm(norm))
