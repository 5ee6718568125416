"""Which way an adapter takes to its delta: by the cost model, by measurement, or as the user says."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from networks.kernels.autotune import Tuner, bucket_of, has_kernels, key_of
from networks.kernels.cost import FUSED, MATERIALISE, Path, Ranges, Setting, allowed, cheapest, way_at
from networks.kernels.products import Base, working_dtype

if TYPE_CHECKING:
    from networks.base import Adapter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Choice:
    """Of one adapter. `taken` is the way of its last input, None before the first."""

    def __init__(self, path: Path = "auto", tuner: Tuner | None = None) -> None:
        """`path` limits the ways to the factored ones or the one that makes dW; a `tuner` measures instead of modelling."""
        self.path: Path = path
        self.tuner = tuner
        self.taken: str | None = None
        self._measured: str | None = None  # the way that is being measured
        self._ranges: dict[tuple[torch.dtype, str, bool], Ranges] = {}
        self._fastest: dict[tuple[torch.dtype, torch.device, bool, int], str] = {}

    def prepare(self, adapter: "Adapter") -> None:
        """Ask the cost model before a compiler traces the layer: what it finds then is a table of constants."""
        if adapter.ways is not None:
            for dtype in DTYPES:
                for joins in (True, False):
                    self._modelled(adapter, (dtype, adapter.alpha.device.type, joins))

    def way(self, adapter: "Adapter", x: Tensor, base: Base | None) -> str:
        """The way for an input, and for the base's product if that is at hand."""
        if not adapter.has_factored_ways:
            way = MATERIALISE
        elif self.tuner is not None and x.numel() and not torch.compiler.is_compiling():
            way = self._measured or self._tuned(adapter, self.tuner, x, _tokens(adapter, x), base)
        else:
            key = (x.dtype, x.device.type, base is not None)
            ranges = self._ranges.get(key) or self._modelled(adapter, key)
            way = ranges[0][1] if len(ranges) == 1 else way_at(ranges, _tokens(adapter, x))
        self.taken = way  # never read here: a compiler would compile again for another value of it
        return way

    def _modelled(self, adapter: "Adapter", key: tuple[torch.dtype, str, bool]) -> Ranges:
        dtype, device_type, joins = key
        ways = adapter.ways
        assert ways is not None
        self._ranges[key] = cheapest(ways, Setting.of(device_type, working_dtype(dtype, device_type), joins), self.path)
        return self._ranges[key]

    def _tuned(self, adapter: "Adapter", tuner: Tuner, x: Tensor, tokens: int, base: Base | None) -> str:
        kind = (x.dtype, x.device, base is not None, bucket_of(tokens))
        if kind in self._fastest:
            return self._fastest[kind]
        ways = adapter.ways
        assert ways is not None
        names = allowed(list(ways.costs(tokens, Setting.of(x.device.type, x.dtype, base is not None))), self.path)
        if has_kernels(x.device) and not adapter.shape.kernel:
            names += [name + FUSED for name in names if name in ways.with_kernels]
        key = key_of(f"{adapter.title} {', '.join(adapter.factors())} {ways} {adapter.shape}", x, tokens, base is not None)
        self._fastest[kind] = tuner.way(key, names, lambda way: self._step(adapter, way, x, base), x.device)
        return self._fastest[kind]

    def _step(self, adapter: "Adapter", way: str, x: Tensor, base: Base | None) -> Callable[[], Any]:
        """One forward and backward of a way on a copy of an input; no gradient of it is left anywhere.

        It may run within a checkpoint, which must not see what is saved here, or in inference mode.
        """
        with torch.inference_mode(False):
            copy = x.detach().clone().requires_grad_()
        inputs = [copy, *(parameter for parameter in adapter.parameters() if parameter.requires_grad)]

        def step() -> None:
            self._measured = way
            try:
                with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
                    y = adapter.delta(copy, base)
                    torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)
            finally:
                self._measured = None

        return step


def _tokens(adapter: "Adapter", x: Tensor) -> int:
    return x.numel() // x.shape[adapter.shape.channel]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
