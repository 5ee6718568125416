"""Anima's denoiser: Cosmos-Predict2's transformer and the adapter that makes its text states, behind one forward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.core.devices import autocast_dtype
from library.models.anima.wide import widen_conditioner, widen_transformer
from library.models.attention import set_attention
from library.models.outlines import is_outline

if TYPE_CHECKING:
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PIXELS = 8  # side of the square of pixels behind one latent position
PATCH = 2  # latent positions along a side of one token


class AnimaDiT(nn.Module):
    """Velocity of noisy latents, given times and text. Takes the two modules over: see `wide.py`.

    Products run in the dtype of the weights (bf16 for fp8 weights with fp32 norms), or in that of an outer autocast; the residual
    stream, the adaptive norms and the time stay float32 (float64 in a float64 model).
    """

    def __init__(self, transformer: "CosmosTransformer3DModel", text_conditioner: "AnimaTextConditioner") -> None:
        super().__init__()
        widen_transformer(transformer)
        widen_conditioner(text_conditioner)
        self.transformer = transformer
        self.text_conditioner = text_conditioner
        set_attention(self, "torch")

    def condition(self, hidden_states: Tensor, mask: Tensor, t5_ids: Tensor, t5_mask: Tensor) -> Tensor:
        """What the transformer attends to, (batch, max(512, T), text width), once for a prompt: rows outside `t5_mask` are zero.

        `hidden_states` (batch, L, width) are Qwen3's, those outside `mask` (batch, L) are not looked at; ids and mask of T5 (batch, T).
        Padding that the whole batch shares is not computed: it is seen by nothing and gives zeros.
        """
        mask, t5_mask = mask.bool(), t5_mask.bool()
        words, pieces, rows = _longest(mask), _longest(t5_mask), t5_ids.shape[1]
        hidden_states, mask, t5_ids, t5_mask = hidden_states[:, :words], mask[:, :words], t5_ids[:, :pieces], t5_mask[:, :pieces]
        states = hidden_states.to(self._stream_dtype()).masked_fill(~mask.unsqueeze(-1), 0)
        seen = mask | ~mask.any(dim=1, keepdim=True)  # an empty prompt attends to its zeros: the same as nothing, and no kernel gives NaN
        with self._precision(states.device):
            text = self.text_conditioner(states, t5_ids, target_attention_mask=t5_mask, source_attention_mask=seen)
        return F.pad(text, (0, 0, 0, max(0, rows - text.shape[1])))

    def forward(self, latents: Tensor, times: Tensor, conditioning: Tensor) -> Tensor:
        """Velocity (batch, 16, height, width), float32, of latents (batch, 16, height, width) at times (batch,) in [0, 1].

        Raises `ValueError` for sides that are odd or longer than the positions reach.
        """
        self._check_sides(latents)
        stream = latents.to(self._stream_dtype())
        padded = F.pad(stream, (0, 0, 0, 0, 0, 1))  # the mask of padding, which is zero: nothing is padded
        with self._precision(latents.device):
            text = conditioning.to(self._product_dtype(latents.device))
            (velocity,) = self.transformer(padded.unsqueeze(2), times.float(), text, return_dict=False)
        return velocity.squeeze(2)

    def enable_gradient_checkpointing(self, call: Callable[..., Any] | None = None) -> None:
        """Recompute the blocks' activations in the backward pass; `call(block, *args)` runs a block in place of a plain checkpoint."""
        self.transformer.enable_gradient_checkpointing(call)
        self.text_conditioner.enable_gradient_checkpointing(call)

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks in their order."""
        return list(self.transformer.transformer_blocks)

    def _check_sides(self, latents: Tensor) -> None:
        height, width = latents.shape[-2:]
        longest = PATCH * max(self.transformer.rope.max_size)
        size = f"{width * PIXELS}x{height * PIXELS} pixels"
        if height % PATCH or width % PATCH:
            raise ValueError(f"{size}: Anima needs sides that are multiples of {PATCH * PIXELS}")
        if max(height, width) > longest:
            raise ValueError(f"{size}: Anima's positions reach {longest * PIXELS} pixels")

    def _stream_dtype(self) -> torch.dtype:
        return torch.promote_types(self._norm_dtype(), torch.float32)

    def _product_dtype(self, device: torch.device) -> torch.dtype:
        """What products are computed in, here and now."""
        if (outer := autocast_dtype(device)) is not None:
            return outer
        keeps_fp8 = self.transformer.proj_out.weight.dtype in FP8
        return torch.bfloat16 if keeps_fp8 and self._norm_dtype() is torch.float32 else self._norm_dtype()

    def _norm_dtype(self) -> torch.dtype:
        """The dtype of the weights, but for those that are stored in fp8: norms never are."""
        return cast(Tensor, self.transformer.time_embed.norm.weight).dtype

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Autocast to half-precision products where the weights ask for it and nobody else has turned it on."""
        dtype = self._product_dtype(device)
        if autocast_dtype(device) is not None or dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(device.type, dtype)


def _longest(mask: Tensor) -> int:
    """The length to which a batch of masks (batch, length) can be cut, at least 1."""
    if is_outline(mask):
        return mask.shape[1]
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return max(1, int((places * mask.any(dim=0)).max()))
