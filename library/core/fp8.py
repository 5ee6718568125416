"""Weights stored in 8 bits."""

import torch
from torch import nn


def store_as_fp8(model: nn.Module) -> int:
    """Keep the weights of Linear and Conv layers as float8_e4m3fn, norms, embeddings and biases as they are; returns how many layers.

    Autocast casts the weights up for each use, so results carry fp8's rounding (3 mantissa bits) of the weights and nothing else.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    for layer in layers:
        layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    return len(layers)
