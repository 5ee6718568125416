"""Models without their weights: what has shapes, dtypes and no numbers."""

import torch
from torch import Tensor


def is_outline(tensor: Tensor) -> bool:
    """Has this tensor no numbers to look at: is it on the meta device, or one of torch's fakes?"""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return tensor.is_meta
    from torch._subclasses.fake_tensor import is_fake

    return tensor.is_meta or is_fake(tensor)
