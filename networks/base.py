"""The contract of an adapter: a small set of parameters that means a change of one layer's weight.

An algorithm is one subclass in one file. Its attribute names are the file's names, so `state_dict()` is the file's content; its
`formula()` is the only place that says what the parameters mean; `delta(x)` is a cheaper way to the same output.
The base output and the delta are computed apart and added: W + dW in half precision would round a small delta away.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import dora
from networks.extras import Dropouts, Extras
from networks.kernels.choice import Choice
from networks.kernels.cost import Ways
from networks.kernels.products import Base, add_base, autocast_dtype
from networks.layers import LayerShape, dense_weight, fitted
from networks.row_blocks import Rows, delta_norm
from networks.stack import attached_to, base_forward_of, kept_weight_of, stack_of


class Adapter(nn.Module, ABC):
    """A change of one layer. Not a submodule of the layer, nor the layer of it; parameters are float32 while training."""

    title: ClassVar[str]  # for messages: LoHa
    signature: ClassVar[tuple[str, ...]]  # parameter names by which a file's entry is known: any of them
    boosted: ClassVar[tuple[str, ...]]  # parameters whose rate LoRA+ multiplies, by the start of their name
    folds_into: ClassVar[tuple[str, ...]]  # the first of these that there is takes up the scalar in files
    Arguments: ClassVar[type]  # the network arguments: a subclass of networks.selection.NetworkArguments
    is_algorithm: ClassVar[bool] = True  # whether it can be trained: False for what is only read from files

    layer: nn.Module
    alpha: Tensor  # float32, 0-d, saved; `scale` is what it means
    scale: float
    scalar: nn.Parameter | None
    dora_scale: nn.Parameter | None

    def __init__(self, name: str, layer: nn.Module, *, rank: int, alpha: float, extras: Extras | None = None) -> None:
        super().__init__()
        self.name = name
        object.__setattr__(self, "layer", layer)  # past nn.Module, which would take it for a part of the adapter
        self.shape = self.shape_of(layer)
        self.rank = rank
        self.network_name: str | None = None
        self.multiplier = 1.0
        self.enabled = True
        self.is_merged = False
        self.dropouts = Dropouts()
        self.choice = Choice()
        self.extras = extras or Extras()
        self.register_buffer("alpha", torch.empty(()))
        self._alpha = 0.0
        self.set_alpha(alpha)
        magnitude = self.extras.magnitude
        self.scalar = nn.Parameter(torch.ones(())) if self.extras.scalar else None
        self.dora_scale = nn.Parameter(torch.empty(dora.magnitude_shape(self.shape, magnitude))) if magnitude else None

    # What an algorithm answers

    @classmethod
    def fresh(cls, name: str, layer: nn.Module, rank: int, alpha: float, arguments: Any) -> "Adapter":
        """A new adapter with a delta of zero, built as the network arguments say."""
        adapter = cls.designed(name, layer, rank, alpha, arguments)
        if not adapter.alpha.is_meta:  # on the meta device there is nothing to fill
            with torch.no_grad():
                adapter.initialise()
                if adapter.dora_scale is not None:
                    adapter.dora_scale.copy_(adapter.magnitudes().view_as(adapter.dora_scale))
        return adapter

    @classmethod
    @abstractmethod
    def designed(cls, name: str, layer: nn.Module, rank: int, alpha: float, arguments: Any) -> "Adapter":
        """A new adapter with empty parameters, its structure as the network arguments say."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> "Adapter":
        """The adapter that a file's tensors mean, its structure read from their shapes. Raises `ValueError`."""

    @abstractmethod
    def initialise(self) -> None:
        """Fill the factors for a delta of zero that every parameter can leave."""

    def begin(self, parameter: Tensor, fill: Callable[[Tensor], Any]) -> None:
        """Let this factor start at zero; with a scalar, which then is the zero, `fill` it instead."""
        if self.scalar is None:
            nn.init.zeros_(parameter)
        else:
            fill(parameter)
            nn.init.zeros_(self.scalar)

    @abstractmethod
    def formula(self) -> Tensor:
        """The delta without its scale, in any shape with the weight's elements in the weight's order; linear in every factor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which the delta is computed outside autocast."""

    @classmethod
    def remarks(cls, adapters: Sequence["Adapter"]) -> list[str]:
        """What the user should be told once about a whole network of freshly made adapters."""
        return []

    @staticmethod
    def shape_of(layer: nn.Module) -> LayerShape:
        """The shape of a layer that this kind of adapter can change. Raises `ValueError` for others."""
        return LayerShape.of(layer)

    @property
    def has_ranks(self) -> bool:
        """Whether `delta` can drop single ranks."""
        return self.shape.groups == 1

    def overlap(self, weight: Tensor, axis: dora.Axis) -> dora.Overlap:
        """<W, formula> and |formula|^2 along `axis`, for `weight` (out, inner, kernel); algorithms need not form the delta for it."""
        return dora.overlap_of_dense(self.formula().reshape(weight.shape), weight, axis)

    # The delta

    @property
    def coefficient(self) -> float | Tensor:
        """What the formula is multiplied by: alpha / rank, and the learned scalar where there is one."""
        return self.scale if self.scalar is None else self.scalar * self.scale

    def scaled(self, factor: Tensor) -> Tensor:
        """A factor times the learned scalar, where there is one."""
        return factor if self.scalar is None else factor * self.scalar

    def direction(self) -> Tensor:
        """The scaled delta at multiplier 1 in the weight's shape, before DoRA, computed in float32 or better."""
        with torch.autocast(self.alpha.device.type, enabled=False):
            formula, coefficient = self.formula(), self.coefficient
            is_scaled = isinstance(coefficient, Tensor) or coefficient != 1
            return (formula * coefficient if is_scaled else formula).reshape(self.shape.weight)

    def delta_weight(self, base: Tensor | None = None) -> Tensor:
        """The change of the weight at multiplier 1, in its shape; DoRA's is of `base`, the layer's own weight if not given."""
        direction = self.direction()
        if self.dora_scale is None:
            return direction
        base = (self.base_weight() if base is None else base).to(direction)
        gain = self.gain(base).view_as(self.dora_scale)
        return (gain - 1) * base + gain * direction

    def delta_bias(self) -> Tensor | None:
        """The change of the bias; algorithms have none."""
        return None

    def delta(self, x: Tensor, base: Base | None = None) -> Tensor:
        """The change of the output for `x` before DoRA; with `base` the layer's whole output, base and delta rounded once.

        Here by the whole weight, in algorithms by something cheaper.
        """
        return self.onto(base, x, self.shape.apply(x, self.direction().to(x.dtype)))

    def onto(self, base: Base | None, x: Tensor, delta: Tensor) -> Tensor:
        """A delta as it is, or on the base's output where there is one."""
        return delta if base is None else add_base(x, base, delta, self.shape)

    def forward(self, x: Tensor, output: Tensor | None = None) -> Tensor:
        """The change of the output for `x` as it is trained: with dropouts, in autocast's dtype or the parameters'.

        `output` is the layer's own output for `x`, which DoRA needs and computes if it is not given.
        """
        given = x
        x = x.to(autocast_dtype(x) or self.dtype)
        if self.training and self.dropouts.neuron:
            x = F.dropout(x, self.dropouts.neuron)
        y = self._dropped_delta(x) if self.dora_scale is None else self._renormalised(x, given, output)
        if self.training and self.dropouts.module:  # a factor rather than a branch: no host sync, and every rank has a gradient
            y = y * (torch.rand((), device=y.device) >= self.dropouts.module).to(y.dtype)
        return y

    @property
    def is_direct(self) -> bool:
        """Whether the layer's output is now base + multiplier * delta and nothing else, so that `delta` can give it whole."""
        return self.extras.magnitude is None and not (self.training and self.dropouts.act)

    @property
    def acts(self) -> bool:
        """Whether the layer's forward has to run this adapter now."""
        return self.enabled and not self.is_merged and self.multiplier != 0

    @property
    def ways(self) -> Ways | None:
        """What each of the algorithm's ways to a delta costs; None where there is one only."""
        return None

    @property
    def has_factored_ways(self) -> bool:
        """Whether the factors can be applied in turn; else the materialised way is the only one."""
        return self.shape.groups == 1

    def way(self, x: Tensor, base: Base | None) -> str:
        """The way to take for an input: the cheapest, or as the network argument `path` says."""
        return self.choice.way(self, x, base)

    def wide(self, parameter: Tensor) -> Tensor:
        """A parameter in at least float32, for `formula`; float8 too, which torch promotes with nothing."""
        return parameter.float() if parameter.itemsize < 4 else parameter

    # Dropouts

    @property
    def drops_ranks(self) -> bool:
        """Whether `delta` has to drop ranks now."""
        return self.training and self.dropouts.rank > 0 and self.dropouts.rank_mode == "rank" and self.has_ranks

    def kept(self, x: Tensor, size: int) -> Tensor:
        """Factors (batch, size) for the batch of `x`: 0 where dropped, 1/(1-p) where kept."""
        ones = torch.ones((*self.shape.batch_of(x), size), device=x.device, dtype=x.dtype)
        return F.dropout(ones, self.dropouts.rank)

    def _dropped_delta(self, x: Tensor) -> Tensor:
        """The delta, with rank dropout on its rows (whole output channels, per sample) where ranks are not dropped."""
        is_transformed = torch._C._are_functorch_transforms_active()  # see `Stack._base`
        y = Adapter.delta(self, x) if is_transformed and self.is_algorithm else self.delta(x)
        if self.training and self.dropouts.rank and not self.drops_ranks:
            y = y * self.shape.along_channels(self.kept(x, self.shape.out), y)
        return y

    # DoRA

    def base_weight(self) -> Tensor:
        """The layer's weight that this adapter is a change of: in plain floats, without what is merged into it."""
        kept = kept_weight_of(self.layer)
        return dense_weight(self.layer) if kept is None else kept

    def magnitudes(self) -> Tensor:
        """|W| of the base for each output or input channel: where DoRA's magnitudes start."""
        assert self.extras.magnitude is not None
        return self._norms(self.base_weight(), with_delta=False)

    @torch.no_grad()
    def measure_changed_weight(self) -> None:
        """Turn magnitudes over |W|, as files for ComfyUI have them, into those over |W + D|. Needs the base's weights."""
        assert self.dora_scale is not None
        base = self.base_weight()
        ratio = self._norms(base, with_delta=True) / self._norms(base, with_delta=False)
        self.dora_scale.mul_(ratio.view_as(self.dora_scale))

    def gain(self, base: Tensor) -> Tensor:
        """m / |W + D| for each output or input channel, float32 or better; W is `base`, in the weight's shape."""
        assert self.dora_scale is not None
        with torch.autocast(self.alpha.device.type, enabled=False):
            with torch.set_grad_enabled(self.extras.full_norm and torch.is_grad_enabled()):
                norms = self._norms(base, with_delta=True)
            return self.wide(self.dora_scale).flatten() / norms

    def _norms(self, base: Tensor, with_delta: bool) -> Tensor:
        axis = self.extras.magnitude
        assert axis is not None
        weight = base.reshape(self.shape.out, self.shape.inner, -1).to(torch.float32 if self.dtype.itemsize < 4 else self.dtype)
        squares = dora.squared_norms(weight, axis)
        if with_delta:
            cross, own = self.overlap(weight, axis)
            squares = squares + 2 * self.coefficient * cross + self.coefficient * self.coefficient * own
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()

    def _renormalised(self, x: Tensor, given: Tensor, output: Tensor | None) -> Tensor:
        """The change of the output under DoRA. `given` is the input as the base sees it, `x` after cast and dropout."""
        gain = self.gain(self.base_weight())
        if self.extras.magnitude == "out":
            bare, y = self._bare(given, output), self._dropped_delta(x)
            return y * self.shape.along_channels(gain, y).to(y.dtype) + bare * self.shape.along_channels(gain - 1, y).to(y.dtype)
        gain = gain.repeat(self.shape.groups)
        y = self._dropped_delta(x * self.shape.along_channels(gain, x).to(x.dtype))
        return y + self._bare(given * self.shape.along_channels(gain - 1, given).to(given.dtype))

    def _bare(self, x: Tensor, output: Tensor | None = None) -> Tensor:
        """The base's output for `x` without its bias, and without what is merged into it; `output` is the layer's, if it is known."""
        kept = kept_weight_of(self.layer)
        if kept is not None:
            return self.shape.apply(x, kept.to(x.dtype))
        output = base_forward_of(self.layer)(x) if output is None else output
        bias = getattr(self.layer, "bias", None)
        return output if bias is None else output - self.shape.along_channels(bias, output)

    # Attaching and merging

    def attach(self) -> None:
        """Add this delta to the layer's output from now on."""
        self.choice.prepare(self)
        if not self.is_attached:
            stack_of(self.layer).attach(self)

    def detach(self) -> None:
        """Stop adding it; without other adapters the layer has its original forward back."""
        if self.is_attached:
            stack_of(self.layer).detach(self)

    @property
    def is_attached(self) -> bool:
        """Whether the layer's forward runs this adapter."""
        return any(adapter is self for adapter in attached_to(self.layer))

    def merge(self, *, keep: bool = True) -> None:
        """Add multiplier * delta to the layer's weight: summed in float32, rounded once. `keep` allows `unmerge`."""
        if not self.is_merged:
            stack_of(self.layer).merge(self, keep)

    def unmerge(self) -> None:
        """Undo `merge`, bit for bit. Raises `ValueError` where no copy was kept."""
        if self.is_merged:
            stack_of(self.layer).unmerge(self)

    # Values

    def set_alpha(self, alpha: float) -> None:
        """Set alpha, and with it the scale alpha/rank; 0 means the rank itself."""
        self._alpha = float(alpha) or float(self.rank)
        self.scale = self._alpha / self.rank
        self.alpha = torch.tensor(self._alpha, dtype=torch.float32, device=self.alpha.device)

    def factors(self) -> dict[str, nn.Parameter]:
        """The algorithm's own parameters by name: all but the scalar and the magnitudes."""
        return {name: value for name, value in self.named_parameters() if name not in ("scalar", "dora_scale")}

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors that a file holds for this layer: `state_dict()` with the scalar folded into a factor."""
        state = dict(self.state_dict())
        scalar = state.pop("scalar", None)
        if scalar is not None:
            place = next(name for name in self.folds_into if name in state)
            state[place] = (self.wide(state[place]) * self.wide(scalar)).to(state[place].dtype)
        return state

    def rows(self) -> Rows | None:
        """The formula a block of rows at a time, in float32 or better, without gradients; None for what gives it whole only."""
        return None

    def delta_norm(self) -> Tensor:
        """The Frobenius norm of the scaled delta before DoRA, from the factors where they tell."""
        return delta_norm(self)

    @torch.no_grad()
    def shrink(self, ratio: float) -> None:
        """Scale the delta, which is linear in every factor, by spreading `ratio` over all factors alike."""
        factors = self.factors().values()
        for factor in factors:
            factor.mul_(ratio ** (1 / len(factors)))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a file. Raises `ValueError` naming missing, foreign and misshapen ones."""
        own = dict(self.named_parameters())
        tensors = dict(tensors)
        if "scalar" in own:
            tensors.setdefault("scalar", torch.ones(()))  # files hold it folded into a factor
        problems = [f"lacks {key}" for key in own if key not in tensors]
        problems += [f"has {key}, which this {self.title} has not" for key in tensors if key not in own and key != "alpha"]
        if problems:
            raise ValueError(f"{self.name}: the file {', '.join(problems)}")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(fitted(tensors[key], tuple(parameter.shape), f"{self.name}.{key}"))
        self.set_alpha(self.stored_alpha(tensors.get("alpha")))

    def stored_alpha(self, alpha: Tensor | None) -> float:
        """The alpha of a file: without one, the rank. Raises `ValueError` for one that is no number."""
        if alpha is None:
            return float(self.rank)
        value = float(alpha) if alpha.numel() == 1 else math.nan
        if not math.isfinite(value):
            raise ValueError(f"{self.name}.alpha: {alpha.tolist()} is not a finite number")
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> "Adapter":
        """`.to(...)`, `.half()`, `.cuda()`: alpha follows the device and stays float32."""
        super()._apply(fn, recurse)
        self.alpha = torch.tensor(self._alpha, dtype=torch.float32, device=self.alpha.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        alpha = state_dict.get(f"{prefix}alpha")
        if alpha is not None and not alpha.is_meta:
            self.set_alpha(self.stored_alpha(alpha))
