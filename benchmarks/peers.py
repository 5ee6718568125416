"""The ways to adapt a layer that are compared: ours, sd-scripts' as its code is known to compute, LyCORIS in both modes, and PEFT.

A way puts an adapter on a layer by replacing the layer's forward, and returns the module that holds its parameters. All take over the
same values (`take_over`), so outputs and gradients are comparable. LyCORIS and PEFT are the installed packages (requirements-test.txt);
ways whose package is absent are left out by `available_ways`.
"""

import copy
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from networks.base import Adapter
from networks.kernels.choice import Choice
from networks.kernels.cost import Path
from networks.layers import LayerShape
from networks.loha import LoHa
from networks.lokr import LoKr, LoKrArguments, Split
from networks.lora import LoRA

ALGORITHMS: dict[str, type[Adapter]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}
OURS, SD_SCRIPTS = "ours", "sd-scripts"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An algorithm with its size. Alpha is half the rank, so that the scale is 1/2 and every way has to apply it."""

    algorithm: str
    rank: int = 16
    factor: int = -1
    is_full: bool = False  # LoKr: both factors whole; its scale is 1 then

    @property
    def title(self) -> str:
        """As tables call it: LoKr f8 r16, LoKr f8 full, LoHa r8."""
        size = "full" if self.is_full else f"r{self.rank}"
        factor = f" f{self.factor}" if self.algorithm == "lokr" else ""
        return f"{ALGORITHMS[self.algorithm].title}{factor} {size}"

    @property
    def alpha(self) -> float:
        return self.rank / 2

    @property
    def arguments(self) -> dict[str, Any]:
        """The network arguments of our algorithm."""
        return {"factor": self.factor, "full_matrix": self.is_full} if self.algorithm == "lokr" else {}


Way = Callable[[nn.Module, Setting], nn.Module]


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model or layer that can be changed on its own and shares every parameter and buffer."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a way trains, by their names in our files."""
    return {_as_ours(name): parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def take_over(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a way's parameters the values and dtypes of another's. Raises `ValueError` where they are not the same parameters."""
    own = trained(module)
    if own.keys() != values.keys():
        raise ValueError(f"{type(module).__name__} trains {', '.join(own)}; values are given for {', '.join(values)}")
    for name, parameter in own.items():
        parameter.data = values[name].detach().reshape(parameter.shape).clone()


def available_ways() -> dict[str, Way]:
    """The ways whose packages are installed, ours first."""
    needs = {LYCORIS: "lycoris", LYCORIS_BYPASS: "lycoris", PEFT: "peft"}
    return {name: way for name, way in WAYS.items() if name not in needs or importlib.util.find_spec(needs[name])}


# Ours


def bare_adapter(layer: nn.Module, setting: Setting) -> Adapter:
    """An adapter of this project, not attached: the values and the formula that every way is held to."""
    algorithm = ALGORITHMS[setting.algorithm]
    return algorithm.fresh("layer", layer, setting.rank, setting.alpha, algorithm.Arguments(**setting.arguments))


def ours(layer: nn.Module, setting: Setting, path: Path = "auto") -> Adapter:
    """An adapter of this project, attached."""
    adapter = bare_adapter(layer, setting)
    adapter.choice = Choice(path)
    adapter.attach()
    return adapter


def path_taken(module: nn.Module) -> str:
    """The way to the delta that our adapter took last; nothing for the other ways, and for LoRA, which has one."""
    return module.choice.taken or "" if isinstance(module, Adapter) else ""


# sd-scripts' way, from the facts: its forward is the layer's output + (delta's own product) * multiplier


class LoRAProducts(nn.Module):
    """y + up(down(x)) * multiplier * scale: two layers beside the frozen one, four passes over its output."""

    def __init__(self, layer: nn.Module, setting: Setting) -> None:
        super().__init__()
        shape = LayerShape.of(layer)
        self.lora_down = _plain_layer(shape, setting.rank)
        self.lora_up = (
            nn.Linear(setting.rank, shape.out, bias=False) if not shape.kernel else nn.Conv2d(setting.rank, shape.out, 1, bias=False)
        )
        self.scale, self.multiplier = setting.alpha / setting.rank, 1.0
        self.base_forward, layer.forward = layer.forward, self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output."""
        return self.base_forward(x) + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale


class DeltaWeight(nn.Module, ABC):
    """y + F.linear(x, dW) * multiplier: the whole dW in every step, by autograd, and a second product as large as the layer's."""

    def __init__(self, layer: nn.Module, setting: Setting, factors: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor))
        self.shape, self.scale, self.multiplier = LayerShape.of(layer), scale, 1.0
        self.base_forward, layer.forward = layer.forward, self.forward

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """The scaled delta."""

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output."""
        delta = self.delta_weight().reshape(self.shape.weight)
        return self.base_forward(x) + self.shape.apply(x, delta) * self.multiplier


class LoHaDeltaWeight(DeltaWeight):
    """Saves the factors and makes both products again in backward; the scale is a new tensor in every forward."""

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def delta_weight(self) -> Tensor:
        scale = torch.tensor(self.scale, dtype=self.hada_w1_b.dtype, device=self.hada_w1_b.device)
        return _HadamardProduct.apply(self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b, scale)  # pyright: ignore[reportReturnType]


class LoKrDeltaWeight(DeltaWeight):
    """kron(w1, w2 or w2_a @ w2_b)."""

    lokr_w1: nn.Parameter
    lokr_w2: nn.Parameter
    lokr_w2_a: nn.Parameter
    lokr_w2_b: nn.Parameter

    def delta_weight(self) -> Tensor:
        w1, w2 = self.lokr_w1, self.lokr_w2 if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        return torch.kron(w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:])), w2) * self.scale


class _HadamardProduct(torch.autograd.Function):
    """(a1 b1) * (a2 b2) * scale, without a word to autocast about its backward, which runs in the factors' dtype therefore."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2, scale)
        return (a1 @ b1) * (a2 @ b2) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        a1, b1, a2, b2, scale = ctx.saved_tensors
        grad = grad * scale
        first, second = grad * (a2 @ b2), grad * (a1 @ b1)
        return first @ b1.T, a1.T @ first, second @ b2.T, a2.T @ second, None


def sd_scripts(layer: nn.Module, setting: Setting) -> nn.Module:
    """An adapter as sd-scripts computes it."""
    if setting.algorithm == "lora":
        return LoRAProducts(layer, setting)
    kind = LoHaDeltaWeight if setting.algorithm == "loha" else LoKrDeltaWeight
    adapter = bare_adapter(layer, setting)
    return kind(layer, setting, {name: factor.detach() for name, factor in adapter.factors().items()}, adapter.scale)


def _plain_layer(shape: LayerShape, out: int) -> nn.Module:
    if not shape.kernel:
        return nn.Linear(shape.inner, out, bias=False)
    return nn.Conv2d(shape.inner, out, shape.kernel, shape.stride, shape.padding, shape.dilation, bias=False)  # pyright: ignore[reportArgumentType]


# Packages


def lycoris(layer: nn.Module, setting: Setting, *, bypass: bool = False) -> nn.Module:
    """A module of LyCORIS: rebuilding the weight, or with `bypass` beside the layer."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    kinds: dict[str, Any] = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
    module = kinds[setting.algorithm]("layer", layer, 1.0, setting.rank, setting.alpha, bypass_mode=bypass, **setting.arguments)
    module.apply_to()
    return module


def peft(layer: nn.Module, setting: Setting) -> nn.Module:
    """A layer of PEFT around the frozen one. It stores LoKr's second factor whole where the rank is at least half its larger side."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    kinds: dict[str, Callable[[], Any]] = {
        "lora": lambda: LoraConfig(target_modules=["layer"], r=setting.rank, lora_alpha=setting.alpha),  # pyright: ignore[reportArgumentType]
        "loha": lambda: LoHaConfig(target_modules=["layer"], r=setting.rank, alpha=setting.alpha),  # pyright: ignore[reportArgumentType]
        "lokr": lambda: LoKrConfig(target_modules=["layer"], decompose_factor=setting.factor, **_lokr_size(layer, setting)),
    }
    holder = nn.ModuleDict({"layer": twin(layer)})
    inject_adapter_in_model(kinds[setting.algorithm](), holder)
    layer.forward = holder["layer"].forward
    return holder["layer"]


def _lokr_size(layer: nn.Module, setting: Setting) -> dict[str, Any]:
    """Rank and alpha: equal where the second factor is whole, since PEFT alone scales that too."""
    shape = LayerShape.of(layer)
    if Split.asked(shape, setting.rank, LoKrArguments(**setting.arguments)).rank2 is not None:
        return {"r": setting.rank, "alpha": setting.alpha}
    rank = max(shape.out, shape.inner) if setting.is_full else setting.rank
    return {"r": rank, "alpha": rank}


LYCORIS, LYCORIS_BYPASS, PEFT = "LyCORIS", "LyCORIS bypass", "PEFT"
WAYS: dict[str, Way] = {
    OURS: ours,
    SD_SCRIPTS: sd_scripts,
    LYCORIS: lycoris,
    LYCORIS_BYPASS: lambda layer, setting: lycoris(layer, setting, bypass=True),
    PEFT: peft,
}
PACKAGES = (LYCORIS, LYCORIS_BYPASS, PEFT)
_SPELLINGS = ((".default", ""), ("lora_A", "lora_down"), ("lora_B", "lora_up"))


def _as_ours(name: str) -> str:
    for theirs, own in _SPELLINGS:
        name = name.replace(theirs, own)
    return name
