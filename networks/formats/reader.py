"""From a file to adapters: every key is used, or named in an error; each layer is read by the algorithm that wrote it."""

from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn

from library.core.log import get_logger
from library.core.tensor_file import listing
from library.models.naming import Naming
from networks.base import Adapter
from networks.dora import BASE_NORM_MARK
from networks.files import WRAPPER, AdapterFile
from networks.formats.keys import MAGNITUDE, Layers, by_name
from networks.formats.names import LIMIT, NameTable, Parts
from networks.formats.peft_config import PeftConfig
from networks.formats.values import LayerTensors
from networks.members import Member, algorithm_of, readable

logger = get_logger(__name__)


class Misfit(ValueError):
    """An adapter with layers that these models have not, or with tensors that do not fit them."""


def read_members(file: AdapterFile, naming: Naming, parts: Parts, *, allow_partial: bool = False) -> list[Member]:
    """The adapters that a file means on these models, in the order of the family's table.

    Raises one `ValueError` naming the file and all that is not understood; with `allow_partial` that is skipped, and said in one warning.
    Adapters of text encoders that are not at hand are left out and said.
    """
    try:
        return members_of(file, NameTable(naming, parts), allow_partial=allow_partial)
    except ValueError as error:
        kind = Misfit if isinstance(error, Misfit) else ValueError
        raise kind(f"{file.path}: {error}" if file.path is not None else str(error)) from error


def members_of(file: AdapterFile, table: NameTable, *, allow_partial: bool = False) -> list[Member]:
    """`read_members` for a table of names in hand; errors do not name the file."""
    problems: list[str] = []
    members: list[Member] = []
    found, left_out = _sorted(file, table, problems)
    if left_out:
        logger.warning("%d adapters are left out: no text encoder was given for %s", len(left_out), listing(left_out, 2))
    rehearsed: set[Hashable] = set()
    for name, values in found.items():
        part, target, layer = table.order[name]
        try:
            members.append(Member(adapter=_adapter(name, layer, values, rehearsed), part=part, target=target))
        except ValueError as error:
            problems.append(str(error))
    _settle(problems, allow_partial and bool(members), file)  # where nothing is left, what is wrong is the answer
    if not members:
        raise ValueError("it holds no adapter for the models at hand")
    settle_magnitudes(file, [member.adapter for member in members])
    return members


def read_layers(file: AdapterFile, table: NameTable) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of each adapter by canonical name, ready for `Adapter.load`. Raises one `ValueError` with all that is wrong.

    Those of text encoders that are not at hand come last, under their names in the file.
    """
    problems: list[str] = []
    layers: dict[str, Mapping[str, Tensor]] = {}
    found, left_out = _sorted(file, table, problems)
    for name, values in found.items():
        try:
            layers[name] = values.canonical(table.order[name][2])
        except ValueError as error:
            problems.append(str(error))
    _settle(problems, False, file)
    return layers | {name: values.tensors for name, values in left_out.items()}


def settle_magnitudes(file: AdapterFile, adapters: Iterable[Adapter]) -> None:
    """Put DoRA's magnitudes of a file written for ComfyUI over the changed weight again; said where there are no weights for it."""
    mark, value = BASE_NORM_MARK
    moved = [adapter for adapter in adapters if adapter.extras.magnitude == "out"]
    if file.metadata.get(mark) != value or not moved:
        return
    if any(adapter.layer.weight.is_meta for adapter in moved):
        logger.warning("its DoRA magnitudes were rescaled for ComfyUI; without the model's weights they are left so")
        return
    for adapter in moved:
        adapter.measure_changed_weight()


# Steps


def _sorted(file: AdapterFile, table: NameTable, problems: list[str]) -> tuple[dict[str, LayerTensors], dict[str, LayerTensors]]:
    """The layers of a file by canonical name in table order, and those of text encoders not at hand; the rest is added to the problems."""
    layers = by_name(file.tensors)
    known = {key for kind in readable() for key in kind.signature}
    if not any(name.startswith(("lora", "lycoris")) or not known.isdisjoint(keys) for name, keys in layers.keys.items()) and layers.keys:
        raise ValueError(
            f"not an adapter that can be read: it holds tensors such as {listing(file.tensors, 2)}, and none like lora_down.weight"
        )
    if layers.bare:
        verb = "is" if len(layers.bare) == 1 else "are"
        problems.append(f"not an adapter: {listing(layers.bare, LIMIT)} {verb} not of the form <name>.<parameter>")
    if layers.twice:
        problems.append(f"a second tensor for the same parameter: {listing(layers.twice, LIMIT)}")
    found, left_out, wrong = table.sort({name: name for name in layers.keys})
    problems += wrong
    return {name: _values(file, layers, given) for name, given in found.items()}, {name: _values(file, layers, name) for name in left_out}


def _values(file: AdapterFile, layers: Layers, name: str) -> LayerTensors:
    keys = layers.keys[name]
    config, path = _config_of(file.config, name)
    return LayerTensors(
        tensors={parameter: file.tensors[key] for parameter, key in keys.items()},
        keys=keys,
        scale=None if config is None else config.scale(path),
        is_peft=config is not None or name.startswith(WRAPPER),
    )


def _config_of(configs: Mapping[str, PeftConfig], name: str) -> tuple[PeftConfig | None, str]:
    """PEFT's configuration of a layer, and the layer's path as PEFT knew it."""
    bare = name
    while bare.startswith(WRAPPER):
        bare = bare.removeprefix(WRAPPER)
    component, _, path = bare.partition(".")
    return (configs[component], path) if component in configs else (configs.get(""), bare)


def _adapter(name: str, layer: nn.Module, values: LayerTensors, rehearsed: set[Hashable]) -> Adapter:
    """The adapter of a layer. What `rehearsed` holds fitted before: the file's other layers of these shapes."""
    algorithm = algorithm_of(name, ["dora_scale" if key == MAGNITUDE else key for key in values.tensors])
    try:
        shape = algorithm.shape_of(layer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    tensors = values.canonical(layer)
    kind = (algorithm, shape, tuple((key, tensor.shape) for key, tensor in tensors.items()))
    try:
        if kind not in rehearsed:
            _rehearse(algorithm, name, layer, tensors)
            rehearsed.add(kind)
        return algorithm.from_tensors(name, layer, tensors)
    except (RuntimeError, TypeError, IndexError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: its tensors do not fit together ({reason:.200})") from error


def _rehearse(algorithm: type[Adapter], name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the adapter on the meta device first: there, tensors that do not fit their layer take no memory."""
    alpha = {"alpha": tensors["alpha"]} if "alpha" in tensors else {}
    shapes = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()} | alpha
    with torch.device("meta"):
        algorithm.from_tensors(name, layer, shapes)


def _settle(problems: list[str], allow_partial: bool, file: AdapterFile) -> None:
    """Raise all problems as one error, a dozen named, or say once that they are skipped, with the rest at a lower level."""
    if not problems:
        return
    more = f"; and {len(problems) - LIMIT} more" if len(problems) > LIMIT else ""
    text = "; ".join(problems[:LIMIT]) + more
    if not allow_partial:
        raise Misfit(text)
    logger.warning("%s: only a part of it is used: %s", file.path or "the adapter", text)
    for problem in problems[LIMIT:]:
        logger.info("also left out: %s", problem)
