"""Devices and dtypes by the names users give them."""

import torch

DTYPES = {"no": torch.float32, "float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_named(name: str) -> torch.dtype:
    """The dtype of `no`, `float`, `fp32`, `fp16` or `bf16`."""
    return DTYPES[name]


def best_device() -> torch.device:
    """CUDA where present, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes products in on this device now, or None where it is off (or there is none, as on meta)."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def fp8_refusal(device: torch.device) -> str | None:
    """Why weights cannot be kept in float8_e4m3fn on this device, or None where they can (tried, not guessed)."""
    if device.type == "mps":
        return "Apple's MPS has no float8 dtype"
    try:
        weight = torch.ones(2, 2, device=device).to(torch.float8_e4m3fn)
        weight.to(torch.bfloat16)
    except (RuntimeError, TypeError) as error:
        return f"the device {device} cannot hold float8_e4m3fn weights ({error})"
    return None
