"""Models that stand in for those of a run: the same modules with fake weights."""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from library.training.forecast.ledger import total_bytes


def stand_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model without weights (on the meta device) fake ones in `dtype`, frozen; call it within `fakes`. Returns the model."""
    _replace(model, lambda parameter: nn.Parameter(_like(parameter, dtype), requires_grad=False), lambda buffer: _like(buffer, dtype))
    return model.eval()


def turn_fake(network: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Put fakes in the place of a network's real tensors, in its parameter groups too; call it within `fakes`."""
    made = _replace(network, lambda each: nn.Parameter(_like(each, each.dtype), each.requires_grad), lambda each: _like(each, each.dtype))
    for group in groups:
        group["params"] = [made[id(parameter)] for parameter in group["params"]]


def own_bytes(*models: nn.Module) -> int:
    """The bytes of the models' parameters and buffers."""
    return total_bytes(chain.from_iterable(chain(model.parameters(), model.buffers()) for model in models))


def _replace(
    model: nn.Module, parameter_like: Callable[[nn.Parameter], nn.Parameter], buffer_like: Callable[[Tensor], Tensor]
) -> dict[int, nn.Parameter]:
    """Replace parameters and buffers; returns the new parameters by the identity of the old ones."""
    kept, made = [], {}  # while an old parameter is kept, no other gets its identity
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:  # tied weights stay tied
                    kept.append(parameter)
                    made[id(parameter)] = parameter_like(parameter)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer_like(buffer)
    return made


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
