"""What a state holds: weights, optimizer, schedule, scaler, average, place, and the generators of every rank; read and put back."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from library.core.atomic import write_text
from library.core.tensor_file import listing
from library.core.tensor_tree import packed, read_tensors, unpacked, write_tensors
from library.training.optimizing.averaging import stepped
from library.training.setup import Run
from library.training.state.folder import CONTENT, BrokenState, FileFacts

Content = dict[str, Any]
SESSION = ("ss_session_id", "ss_training_started_at")
"""Entries of the metadata that a resumed run keeps: it is the same run."""


def content_of(run: Run) -> Content:
    """All of a run by part, as trees of values and tensors. Every rank calls it; the first one's is what is written."""
    ranks = gather_object([{"generators": generator_states(run.accelerator.device), "instruments": run.instruments.state_dict()}])
    scaler = run.accelerator.scaler
    with run.engine.whole(run.context.model):
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _tensors(run.trained.network)}
    return {
        "weights": weights,
        "optimizer": run.engine.optimizer_state(run.context.model, run.optimizer),
        "schedule": run.schedule.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "average": None if run.average is None else run.average.state_dict(),
        "ranks": ranks,
        "place": {"step": run.step, "epoch": run.epoch, "taken": run.taken, "skipped": run.skipped},
        "losses": torch.tensor(run.progress.losses, dtype=torch.float64),
        "log_length": run.log.mark(),
        "metadata": {name: run.metadata[name] for name in SESSION if name in run.metadata},
    }


def packed_parts(content: Content) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The content's JSON text, and the tensors of every part that has some. Raises `ValueError` for what no state can hold."""
    texts, tensors = {}, {}
    for part, tree in content.items():
        texts[part], tensors[part] = packed(tree, part)
    return json.dumps(texts), {part: found for part, found in tensors.items() if found}


def write_content(folder: Path, text: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FileFacts]:
    """Write what `packed_parts` gave; returns what the manifest says of the files. Raises `ValueError` where the system refuses."""
    facts = {}
    for part, found in tensors.items():
        written = write_tensors(folder / f"{part}.safetensors", found)
        facts[written.path.name] = FileFacts(written.size, written.sha256)
    try:
        write_text(folder / CONTENT, text)
    except OSError as error:
        raise ValueError(f"{folder / CONTENT}: could not be written ({error.strerror or error})") from error
    return facts | {CONTENT: FileFacts.of(folder / CONTENT)}


def read_content(folder: Path) -> Content:
    """The content of a state that was verified. Raises `BrokenState` where it was damaged since."""
    try:
        texts = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        files = {part: folder / f"{part}.safetensors" for part in texts}
        return {part: unpacked(text, read_tensors(files[part]) if files[part].is_file() else {}) for part, text in texts.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BrokenState(f"{folder}: cannot be read: {error}") from error


# Put back


def restore_weights(run: Run, weights: Mapping[str, Tensor], *, alphas: bool = True) -> None:
    """Give the network the weights and buffers of a state, its alphas where those are not to be this run's.

    Raises `ValueError` naming all that does not fit, before any is changed.
    """
    own = dict(_tensors(run.trained.network))
    missing, extra = [name for name in own if name not in weights], [name for name in weights if name not in own]
    other = [
        f"{name} {list(weights[name].shape)} for {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    kinds = {"the state lacks": missing, "the state has, and the network lacks": extra, "of another shape": other}
    problems = [f"{what} {len(found)}: {listing(found)}" for what, found in kinds.items() if found]
    if problems:
        raise ValueError("the state's weights do not fit this network; " + "; ".join(problems))
    with torch.no_grad():
        for name, tensor in own.items():
            if alphas or name.rpartition(".")[2] != "alpha":
                tensor.copy_(weights[name])


def restore_optimizer(run: Run, state: dict[str, Any]) -> None:
    """Give the optimizer its state. Raises `ValueError` where it is of another optimizer."""
    load_exactly(run.optimizer, state, lambda found: run.engine.load_optimizer_state(run.context.model, run.optimizer, found))


def load_exactly(optimizer: Optimizer, state: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Load a state into an optimizer, each tensor in the dtype that it was kept in: torch's own loading casts to the parameters'.

    Raises `ValueError` where it does not fit.
    """
    try:
        load(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"the state is of another optimizer or of other weights: {error}") from error
    inner = stepped(optimizer)
    members = [member for group in inner.param_groups for member in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for member, number in zip(members, numbers, strict=True):
        loaded = inner.state.get(member, {})
        for key, kept in state["state"].get(number, {}).items():
            if isinstance(kept, Tensor) and isinstance(found := loaded.get(key), Tensor) and found.dtype != kept.dtype:
                loaded[key] = kept.to(found.device, copy=True)


def restore_ranks(run: Run, ranks: list[dict[str, Any]]) -> bool:
    """Give this rank its generators and readings; False where the state has none of this rank."""
    rank = run.accelerator.process_index
    if rank >= len(ranks):
        return False
    set_generators(ranks[rank]["generators"], run.accelerator.device)
    run.instruments.load_state_dict(ranks[rank]["instruments"])
    return True


def restore_rest(run: Run, content: Content) -> None:
    """Give the run its scaler, average, figures, and the session that its files name."""
    if run.accelerator.scaler is not None and content["scaler"]:
        run.accelerator.scaler.load_state_dict(content["scaler"])
    if run.average is not None and content["average"] is None:
        run.average.begin()
    elif run.average is not None:
        run.average.load_state_dict(content["average"])
    run.progress.take_up(content["losses"].tolist(), content["place"]["step"])
    run.metadata |= content["metadata"]
    run.skipped = content["place"]["skipped"]


# Generators


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of all global generators of this process: Python's, numpy's, torch's, and the device's.

    Training draws from keyed ones; third-party networks and optimizers may draw from these.
    """
    name, keys, *rest = numpy.random.get_state(legacy=True)
    assert not isinstance(keys, str)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type in ("cuda", "mps", "xpu"):
        states[device.type] = _device_module(device).get_rng_state(*_of(device))
    return states


def set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Set the global generators; those of a kind of device that this process does not use are left out."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if device.type in states:
        _device_module(device).set_rng_state(states[device.type], *_of(device))


def _device_module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _of(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


# Parts of a run


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those too that no file holds."""
    yield from network.named_parameters()
    yield from network.named_buffers()
