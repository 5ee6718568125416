"""Triton kernels for GPUs, each behind a plain function whose PyTorch form computes the same anywhere.

`hadamard` (LoHa's delta and its factor gradients), `linear` (a frozen layer and a small product onto it, rounded once) and `mixing` (LoKr's
small first factor). A function takes the kernel where its `supports_...` says so, else the PyTorch form, `composed_...`; whether the kernel
is the faster one is for the caller to know. None is differentiable: they are the insides of autograd functions, and each is an operator
`hadron::NAME` for `torch.compile`. Triton itself is imported by the first launch.
"""
