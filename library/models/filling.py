"""Models of the libraries, built without memory and filled with the tensors of a file whose names and shapes are checked before."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.core.tensor_file import listing
from library.models.weights import Shapes, Weights


@dataclass(frozen=True)
class Form:
    """How an original tensor relates to the library's: the shape it must have, and the way to the library's tensor."""

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # of the original, given the library's
    read: Callable[[Tensor], Tensor]


SAME = Form(lambda shape: shape, lambda tensor: tensor)


@dataclass(frozen=True)
class Source:
    """Where a library tensor stands in the original: its key without the component's prefix, and its form there."""

    key: str
    form: Form = SAME


@dataclass(frozen=True)
class Component:
    """One model of a family: its prefix in the file, and the way from shapes to an empty module and its sources."""

    title: str
    prefix: str
    build: Callable[[Shapes], nn.Module]  # parameters on the meta device; ValueError says what the shapes lack
    sources: Callable[[nn.Module], dict[str, Source]]
    variants: tuple[tuple[str, Source], ...] = ()  # library tensors that some files keep in another place than `sources` says


@dataclass(frozen=True)
class Plan:
    """An empty module, and where its tensors stand in the weights."""

    module: nn.Module
    prefix: str
    sources: dict[str, Source]

    def fill(self, weights: Weights, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The module with its tensors, cast one by one so that a second copy of the whole never exists; frozen, in eval mode."""
        tensors = weights.read(self.prefix + source.key for source in self.sources.values())
        pairs = zip(self.sources.items(), tensors, strict=True)
        shapes = {name: tensor.shape for name, tensor in self.module.state_dict().items()}
        state = {name: source.form.read(tensor).reshape(shapes[name]).to(device, dtype) for (name, source), tensor in pairs}
        self.module.load_state_dict(state, strict=True, assign=True)
        return self.module.to(device).eval().requires_grad_(False)  # .to moves the buffers that no file holds


def plan(component: Component, shapes: Shapes) -> Plan:
    """The module that these shapes (without the component's prefix) describe.

    Raises `ValueError` with every missing, extra and misshapen key.
    """
    try:
        module = component.build(shapes)
    except ValueError as error:
        where = f" (under '{component.prefix}')" if component.prefix else ""
        raise ValueError(f"the {component.title}{where} {error}") from error
    sources = component.sources(module) | {name: source for name, source in component.variants if source.key in shapes}
    problems = _mismatches(component, module, sources, shapes)
    if problems:
        raise ValueError("\n".join(problems))
    return Plan(module, component.prefix, sources)


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` with parameters on the meta device; unlike under `torch.device("meta")`, buffers such as CLIP's position ids are real."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return build()


def same_names(module: nn.Module) -> dict[str, Source]:
    """The sources of a file that has the library's own names."""
    return {key: Source(key) for key in module.state_dict()}


# Checks


def _mismatches(component: Component, module: nn.Module, sources: Mapping[str, Source], shapes: Shapes) -> list[str]:
    state = module.state_dict()
    wanted = {source.key: source.form.shape(tuple(state[name].shape)) for name, source in sources.items()}
    missing = [component.prefix + key for key in wanted if key not in shapes]
    extra = [component.prefix + key for key in shapes if key not in wanted]
    misshapen = [
        f"{component.prefix}{key} {list(shapes[key])} for {list(shape)}"
        for key, shape in wanted.items()
        if key in shapes and not _fits(shapes[key], shape)
    ]
    found = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    return [f"{component.title}: {len(keys)} {what} tensors: {listing(keys)}" for what, keys in found if keys]


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal, or a 1x1 convolution that a converter wrote as a matrix."""
    return found == wanted or (wanted[2:] == (1, 1) and found == wanted[:2])
