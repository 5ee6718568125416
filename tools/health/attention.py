"""The ways to compute attention: which are here, and whether they are right."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.models.attention import BACKENDS, Attend, kernel_problem, missing_package
from tools.health.finding import Finding, Patient, fail, first_line, ok

SHAPE = (2, 96, 4, 64)  # batch, tokens, heads, width of a head
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""dtype -> the relative error that outputs and gradients may have."""
LOOSER = {"sageattn": 0.1}  # it computes in 8 bits
TORCHS_OWN = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(patient: Patient) -> Iterator[Finding]:
    """Every `--attn_mode`, and torch's own kernels behind `torch`, against the formula in float64."""
    for device in patient.devices:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        yield from (_mode(mode, device, dtype) for mode in BACKENDS if mode != "sdpa")  # which is another name of torch
        yield _kernels_of_torch(device, dtype)


def _mode(mode: str, device: torch.device, dtype: torch.dtype) -> Finding:
    subject = f"--attn_mode {mode} on {device}"
    if (reason := missing_package(mode) or kernel_problem(mode, device, dtype)) is not None:
        return ok(subject, f"not to be had: {reason.partition(': ')[2]}")
    try:
        error = _error(BACKENDS[mode].build(), device, dtype, trains=BACKENDS[mode].trains)
    except Exception as problem:  # whatever a kernel that was built for another machine raises
        return fail(subject, f"does not run: {first_line(problem)}", "use --attn_mode torch, or install the package for this torch and GPU")
    text = f"relative error {error:.1e} in {str(dtype).removeprefix('torch.')}"
    if not error <= LOOSER.get(mode, BOUNDS[dtype]):
        return fail(subject, f"is wrong: {text}", "use another --attn_mode, and install the package for this torch and GPU")
    return ok(subject, text)


def _kernels_of_torch(device: torch.device, dtype: torch.dtype) -> Finding:
    """Which of torch's kernels run here; those that do must be right."""
    right, wrong, absent = [], [], []
    for name, backend in TORCHS_OWN.items():
        try:
            with sdpa_kernel(backend):
                error = _error(_torchs, device, dtype, trains=True)
        except RuntimeError:  # torch says so where a kernel is not for this device or dtype
            absent.append(name)
            continue
        (right if error <= BOUNDS[dtype] else wrong).append(f"{name} ({error:.1e})")
    subject = f"torch's attention on {device}"
    if wrong:
        return fail(subject, f"wrong: {', '.join(wrong)}", "update torch and the driver")
    others = f"; not for this device: {', '.join(absent)}" if absent else ""
    return ok(subject, f"right: {', '.join(right)}{others}")


def _torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def _error(attend: Attend, device: torch.device, dtype: torch.dtype, *, trains: bool) -> float:
    """The largest relative error of the output, and of the three gradients where the kernel trains."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(3)]
    leaves = [x.to(device).requires_grad_(trains) for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    with contextlib.nullcontext() if trains else torch.no_grad():
        output = attend(*leaves)
    expected = _formula(*exact)
    pairs = [(output, expected)]
    if trains:
        gradient = torch.randn(SHAPE, generator=generator)
        ours = torch.autograd.grad(output, leaves, gradient.to(device, dtype))
        pairs += zip(ours, torch.autograd.grad(expected, exact, gradient.to(dtype).double()), strict=True)
    return max(float((x.detach().double().cpu() - y.detach()).norm() / y.detach().norm()) for x, y in pairs)


def _formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(width)) V for (batch, tokens, heads, width)."""
    weights = torch.einsum("bqhw,bkhw->bhqk", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhw->bqhw", weights, value)
