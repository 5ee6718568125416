"""What the denoiser's blocks keep in one step of a given shape, for the budget of activations."""

from typing import Any

from library.models.architecture import Architecture
from library.training.forecast.ledger import Ledger
from library.training.forecast.phases import Shape, step_inputs
from library.training.memory.activations import saved_bytes
from library.training.memory.budget import Activations
from library.training.model import TrainingModel


def kept_by_blocks(model: TrainingModel, arch: Architecture, text: Any, shape: Shape) -> Activations:
    """The bytes of every block, and all that is between them, of a step that recomputes nothing; call it within `fakes`."""
    noisy, timesteps, sizes = step_inputs(arch, shape)
    blocks = arch.blocks(model.denoiser)
    kept: list[Any] = []
    with Ledger() as ledger:
        found = saved_bytes(model, blocks, lambda: kept.append(model(noisy, timesteps, text, sizes)))
        alive = ledger.alive
    return Activations(blocks=found, between=max(0, alive - sum(block.given + block.kept for block in found)))
