"""Models that stand in for those of a run: the same modules with fake weights."""

from itertools import chain

import torch
from torch import Tensor, nn

from library.training.forecast.ledger import total_bytes


def stand_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model without weights (on the meta device) fake ones in `dtype`, frozen; call it within `fakes`. Returns the model."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:  # tied weights stay tied
                    made[id(parameter)] = nn.Parameter(_like(parameter, dtype), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _like(buffer, dtype)
    return model.eval()


def own_bytes(*models: nn.Module) -> int:
    """The bytes of the models' parameters and buffers."""
    return total_bytes(chain.from_iterable(chain(model.parameters(), model.buffers()) for model in models))


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
