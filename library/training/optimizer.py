"""Optimizers by name or dotted class path, with arguments checked against the constructor before anything is loaded."""

import ast
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from library.core.options import OptionError, option, pairs
from library.core.spelling import unknown

OPTIMIZERS = {
    "AdamW": "torch.optim.AdamW",
    "SGD": "torch.optim.SGD",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "Lion": "library.training.lion.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "Adafactor": "transformers.optimization.Adafactor",
}
CHOSEN_ELSEWHERE = {"params": "the network's parameters", "lr": "--learning_rate, --unet_lr, --text_encoder_lr"}
NEEDS_CUDA = {"PagedAdamW", "PagedAdamW8bit", "PagedLion8bit"}  # paged memory is CUDA's


@dataclass(kw_only=True, frozen=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option("AdamW", help=f"{', '.join(OPTIMIZERS)} (any case), or the dotted path of an Optimizer class")
    optimizer_args: tuple[str, ...] = option(
        (), help="arguments of its constructor as key=value, for example weight_decay=0.01 betas=0.9,0.99"
    )
    learning_rate: float = option(2e-6, help="learning rate where no more special one is given; adapters usually take 1e-4 to 1e-3")
    unet_lr: float | None = option(None, help="learning rate of the denoiser's adapters; learning_rate if absent, 0 freezes them")
    text_encoder_lr: tuple[float, ...] = option(
        (), help="learning rates of the text encoders' adapters: one for all or one each, 0 freezes"
    )
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm; 0 turns clipping off")

    def check(self) -> Iterable[str]:
        """What is wrong: rates below zero, an optimizer or argument that does not exist."""
        for name in ("learning_rate", "unet_lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value < 0:
                yield f"--{name} {value}: must not be negative"
        if any(rate < 0 for rate in self.text_encoder_lr):
            yield f"--text_encoder_lr {' '.join(map(str, self.text_encoder_lr))}: must not be negative"
        try:
            arguments = optimizer_arguments(optimizer_class(self.optimizer_type), self.optimizer_args)
        except ValueError as error:
            yield from str(error).splitlines()
        else:
            if arguments.get("relative_step"):
                yield "--optimizer_args relative_step=True: Adafactor would find its own rate; leave it out and give --learning_rate"


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of an optimizer name or dotted path. Raises `ValueError` that says what is missing or what was meant."""
    by_fold = {known.lower(): path for known, path in OPTIMIZERS.items()}
    path = by_fold.get(name.lower(), name)
    if "." not in path:
        raise ValueError(f"--optimizer_type {name}: {unknown(name, OPTIMIZERS, 'optimizer')}")
    if path in {OPTIMIZERS[known] for known in NEEDS_CUDA} and not torch.cuda.is_available():
        raise ValueError(f"--optimizer_type {name}: paged optimizers need a CUDA device; use {name[5:] or 'AdamW8bit'}")
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--optimizer_type {name}: cannot import {path} ({error}); install its package or check the path") from None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"--optimizer_type {name}: {path} is not a torch Optimizer class")
    return found


def optimizer_arguments(kind: type[Optimizer], texts: Iterable[str]) -> dict[str, Any]:
    """The `key=value` texts as keyword arguments of `kind`. Raises `OptionError` with every unknown name at once."""
    signature = inspect.signature(kind.__init__).parameters
    known = [name for name in signature if name not in ("self", *CHOSEN_ELSEWHERE)]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
    problems, arguments = [], {}
    for given in pairs(texts, "--optimizer_args"):
        if given.name in CHOSEN_ELSEWHERE:
            problems.append(f"{given.where}: is set by {CHOSEN_ELSEWHERE[given.name]}")
        elif given.name not in known and not takes_any:
            problems.append(f"{given.where}: {unknown(given.name, known, f'argument of {kind.__name__}')}")
        else:
            arguments[given.name] = _literal(given.value)
    if problems:
        raise OptionError(problems)
    return arguments


def build_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    """The optimizer over parameter groups that carry their own `lr`. Raises `ValueError` when its constructor refuses."""
    kind = optimizer_class(options.optimizer_type)
    arguments = optimizer_arguments(kind, options.optimizer_args)
    if kind.__name__ == "Adafactor" and kind.__module__.startswith("transformers"):
        arguments = {"relative_step": False, "scale_parameter": False, "warmup_init": False} | arguments  # the rate is the schedule's
    if kind is torch.optim.AdamW and "foreach" not in arguments and "fused" not in arguments:
        arguments["fused"] = all(parameter.device.type in ("cuda", "cpu") for group in groups for parameter in group["params"])
    return _construct(kind, groups, {**arguments, "lr": options.learning_rate})


def _construct(kind: type[Optimizer], groups: list[dict[str, Any]], arguments: dict[str, Any]) -> Optimizer:
    try:
        return kind(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ValueError(f"--optimizer_type {kind.__name__} with {shown}: {error}") from error


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
