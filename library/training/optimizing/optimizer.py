"""Optimizers by name or dotted class path, with arguments checked against the constructor before anything is loaded."""

import importlib
import io
import math
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from library.core.log import get_logger
from library.core.options import option
from library.core.rules import Rule
from library.core.spelling import unknown
from library.training.optimizing.averaging import is_schedule_free
from library.training.optimizing.constructor import arguments_for, parameters_of_call
from library.training.optimizing.fused_backward import steps_each_alone
from library.training.optimizing.rounding import StochasticRounding

logger = get_logger(__name__)

OPTIMIZERS = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "AdEMAMix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "PagedAdEMAMix8bit": "bitsandbytes.optim.PagedAdEMAMix8bit",
    "Lion": "library.training.optimizing.lion.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "Adafactor": "transformers.optimization.Adafactor",
    "Prodigy": "prodigyopt.Prodigy",
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
}
"""Name -> class; every other Optimizer of torch.optim goes by its own name."""

SET_BY_NAME = {"SGDNesterov": {"nesterov": True, "momentum": 0.9}, "SGDNesterov8bit": {"momentum": 0.9}}
"""Arguments that a name stands for; --optimizer_args may say otherwise."""

UNFIT = {"LBFGS": "evaluates the loss several times a step, which training does not", "SparseAdam": "is for sparse gradients only"}
CHOSEN_ELSEWHERE = {"params": "the network's parameters", "lr": "--learning_rate, --unet_lr, --text_encoder_lr"}
RATE_BESIDE_D = (0.1, 10.0)  # learning rates that make sense as a factor of the rate that an optimizer finds


def _in_vain(rate: str) -> Rule:
    """A learning rate beside an Adafactor that finds its own; 0 still freezes."""

    def in_vain(values: dict[str, Any]) -> bool:
        options = OptimizerOptions(optimizer_type=values["optimizer_type"], optimizer_args=values["optimizer_args"])
        return options.relative_step and values[rate] not in (0, (0,))

    return Rule(option=rate, when=in_vain, because="Adafactor with relative_step=True finds its own rate")


@dataclass(kw_only=True, frozen=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option(
        "AdamW", help=f"{', '.join(OPTIMIZERS)}, another class of torch.optim (any case), or the dotted path of an Optimizer class"
    )
    optimizer_args: tuple[str, ...] = option(
        (), help="arguments of its constructor as key=value, for example weight_decay=0.01 betas=0.9,0.99"
    )
    learning_rate: float = option(2e-6, help="learning rate where no more special one is given; adapters usually take 1e-4 to 1e-3")
    unet_lr: float | None = option(None, help="learning rate of the denoiser's adapters; learning_rate if absent, 0 freezes them")
    text_encoder_lr: tuple[float, ...] = option(
        (), help="learning rates of the text encoders' adapters: one for all or one each, 0 freezes"
    )
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm; 0 turns clipping off")
    fused_backward_pass: bool = option(
        False, help="step each weight as soon as the backward pass has its gradient, and free that: less memory; clips each tensor alone"
    )

    RULES: ClassVar[tuple[Rule, ...]] = tuple(map(_in_vain, ("learning_rate", "unet_lr", "text_encoder_lr")))

    def check(self) -> Iterable[str]:
        """What is wrong: rates below zero, an optimizer or argument that does not exist, values that the constructor refuses."""
        for name in ("learning_rate", "unet_lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value < 0:
                yield f"--{name} {value}: must not be negative"
        if any(rate < 0 for rate in self.text_encoder_lr):
            yield f"--text_encoder_lr {' '.join(map(str, self.text_encoder_lr))}: must not be negative"
        rates = {"learning_rate": (self.learning_rate,), "unet_lr": (self.unet_lr,), "text_encoder_lr": self.text_encoder_lr}
        yield from (f"--{name} inf: must be finite" for name, given in rates.items() if math.inf in given)
        try:
            small_optimizer(self)
            kind = optimizer_class(self.optimizer_type)
            if self.fused_backward_pass and not steps_each_alone(partial(_made, kind, _arguments(kind, self, "cpu"))):
                yield f"--fused_backward_pass: {kind.__name__} steps one weight by what all of them did; leave it out, or use AdamW"
        except ValueError as error:
            yield from str(error).splitlines()

    @property
    def relative_step(self) -> bool:
        """Whether Adafactor finds its own rate. Raises `ValueError` for an optimizer or arguments that `check` refuses."""
        kind = optimizer_class(self.optimizer_type)
        return _is_adafactor(kind) and bool(optimizer_arguments(kind, self.optimizer_args).get("relative_step"))


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of an optimizer name or dotted path. Raises `ValueError` that says what is missing or what was meant."""
    path = OPTIMIZERS.get(_known(name)) or _torch_names().get(name.lower(), name)
    if "." not in path:
        raise ValueError(f"--optimizer_type {name}: {unknown(name, [*OPTIMIZERS, *_torch_names(folded=False)], 'optimizer')}")
    module, _, attribute = path.rpartition(".")
    if module.startswith("bitsandbytes") and attribute.startswith("Paged") and not torch.cuda.is_available():
        instead = attribute.removeprefix("Paged").replace("32bit", "")  # paged memory is CUDA's
        raise ValueError(f"--optimizer_type {name}: paged optimizers need a CUDA device; use {instead}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--optimizer_type {name}: cannot import {path} ({error}); install its package or check the path") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"--optimizer_type {name}: {path} is not a torch Optimizer class")
    if found.__name__ in UNFIT and found.__module__.startswith("torch."):
        raise ValueError(f"--optimizer_type {name}: {found.__name__} {UNFIT[found.__name__]}; use AdamW")
    return found


def optimizer_arguments(kind: type[Optimizer], texts: Iterable[str]) -> dict[str, Any]:
    """The `key=value` texts as keyword arguments of `kind`. Raises `OptionError` with every unknown name and wrong type at once."""
    return arguments_for(kind, texts, "--optimizer_args", CHOSEN_ELSEWHERE)


def finds_rate(kind: type[Optimizer]) -> bool:
    """Whether an optimizer estimates its step size (D-Adaptation, Prodigy): its learning rate is then a factor, usually 1."""
    return "d0" in parameters_of_call(kind)


def small_optimizer(options: OptimizerOptions) -> Optimizer:
    """The optimizer over one small weight, for trials. Raises `ValueError` when there is none, or the constructor refuses."""
    kind = optimizer_class(options.optimizer_type)
    group = {"params": [nn.Parameter(torch.zeros(2, 2))], "lr": options.learning_rate}
    return _made(kind, _arguments(kind, options, "cpu"), [group])


def build_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions, *, seed: int = 0) -> Optimizer:
    """The optimizer over parameter groups that carry their own `lr`, ready to train.

    bfloat16 parameters are rounded stochastically, with noise from `seed`. Raises `ValueError` when the constructor refuses, or for
    rates that the optimizer cannot hold.
    """
    kind = optimizer_class(options.optimizer_type)
    parameters = [parameter for group in groups for parameter in group["params"]]
    arguments = _arguments(kind, options, *{parameter.device.type for parameter in parameters})
    if finds_rate(kind):
        _check_factors(kind, [group.get("lr", options.learning_rate) for group in groups])
    if _known(options.optimizer_type) == "SGDNesterov8bit":
        logger.warning("SGDNesterov8bit: the 8-bit SGD of bitsandbytes has momentum, but not Nesterov's; as in sd-scripts")
    if options.relative_step:
        logger.info("Adafactor finds its own rate: learning rates are not used")
    groups = [{"lr": options.learning_rate, **group} for group in groups]
    make = partial(_made, kind, arguments)
    rounds = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    optimizer = StochasticRounding(make, groups, seed) if rounds else make(groups)
    if rounds:
        logger.info("adapters in bfloat16: %s steps float32 copies, which are rounded stochastically", kind.__name__)
    return optimizer


# What the constructor gets


def _arguments(kind: type[Optimizer], options: OptimizerOptions, *devices: str) -> dict[str, Any]:
    """The keyword arguments of an optimizer over parameters on some types of device."""
    arguments = SET_BY_NAME.get(_known(options.optimizer_type), {}) | optimizer_arguments(kind, options.optimizer_args)
    if kind is torch.optim.AdamW and "foreach" not in arguments and "fused" not in arguments:
        arguments["fused"] = all(device in ("cuda", "cpu") for device in devices)
    if _is_adafactor(kind) and arguments.get("relative_step"):
        return {**arguments, "lr": None}
    if _is_adafactor(kind):  # the rate is the schedule's
        arguments = {"relative_step": False, "scale_parameter": False, "warmup_init": False} | arguments
    return {**arguments, "lr": options.learning_rate}


def _made(kind: type[Optimizer], arguments: dict[str, Any], groups: list[dict[str, Any]]) -> Optimizer:
    said = io.StringIO()  # some constructors print
    try:
        with redirect_stdout(said):
            optimizer: Any = kind(groups, **arguments)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        shown = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"--optimizer_type {kind.__name__} with {shown}: {error}") from error
    if said.getvalue():
        logger.debug("%s: %s", kind.__name__, said.getvalue().strip())
    if is_schedule_free(kind):
        optimizer.train()
    return optimizer


def _check_factors(kind: type[Optimizer], rates: Sequence[float]) -> None:
    """Rates beside an estimated one: one for all. Raises `ValueError` for several; says so where one is far from 1."""
    factors = sorted({rate for rate in rates if rate})
    if len(factors) > 1:
        given = ", ".join(f"{rate:g}" for rate in factors)
        raise ValueError(
            f"--optimizer_type {kind.__name__}: finds one rate for all weights, but was given the factors {given}; give one "
            "--learning_rate, and no --unet_lr, --text_encoder_lr, LoRA+ or network_reg_lrs that differ from it"
        )
    if factors and not RATE_BESIDE_D[0] <= factors[0] <= RATE_BESIDE_D[1]:
        logger.warning("%s finds the rate itself, times the learning rate %g; 1 is usual", kind.__name__, factors[0])


def _is_adafactor(kind: type[Optimizer]) -> bool:
    return kind.__name__ == "Adafactor" and kind.__module__.startswith("transformers")


# Names


def _known(name: str) -> str:
    """A name of the table in its own spelling; others as they are. sd-scripts takes an empty name for AdamW."""
    return {known.lower(): known for known in OPTIMIZERS}.get(name.lower(), name) or "AdamW"


def _torch_names(*, folded: bool = True) -> dict[str, str]:
    kinds = [
        kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    ]
    return {kind.__name__.lower() if folded else kind.__name__: f"torch.optim.{kind.__name__}" for kind in kinds}
