"""Switches of torch's CUDA back-ends: `--cuda_allow_tf32`, `--cuda_cudnn_benchmark`."""

from dataclasses import dataclass

import torch

from library.core.log import get_logger
from library.core.options import option

logger = get_logger(__name__)


@dataclass(kw_only=True, frozen=True)
class SpeedOptions:
    """Speed on CUDA GPUs."""

    cuda_allow_tf32: bool = option(False, help="products and convolutions of float32 in TF32: 10 bits of mantissa, several times faster")
    cuda_cudnn_benchmark: bool = option(False, help="let cuDNN try its convolutions once for each size of picture and keep the fastest")


def set_backend_switches(options: SpeedOptions) -> None:
    """Set the switches that are asked for, for the whole process; without a CUDA GPU, say that they have no effect."""
    names = [f"--{name}" for name in ("cuda_allow_tf32", "cuda_cudnn_benchmark") if getattr(options, name)]
    if names and not torch.cuda.is_available():
        logger.warning("%s: no effect without a CUDA GPU", " and ".join(names))
        return
    if options.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if options.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
