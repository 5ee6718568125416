"""A run that a test moves by hand, so that it can be stopped anywhere and taken up again."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from small_family import SmallFamily
from torch import Tensor

from library.core.command_line import OptionSet, parse_command_line
from library.training.length import RunOptions
from library.training.parallel.team import Team
from library.training.preflight import preflight
from library.training.prepare import epochs_of, make_accelerator
from library.training.retired import refused_options
from library.training.run import option_groups
from library.training.setup import Run, set_up
from library.training.state.folder import Stands
from library.training.state.resuming import resume
from library.training.state.saving import keep_state
from library.training.state.states import States
from library.training.update import update


@dataclass
class StoppedRun:
    """A run with its states, and what its state said when it was taken up."""

    run: Run
    states: States
    stands: Stands | None

    def weights(self) -> dict[str, Tensor]:
        """What is trained, as it is now."""
        return {name: parameter.detach().clone() for name, parameter in self.run.trained.network.named_parameters()}

    def go_on(self, until: int | None = None) -> "StoppedRun":
        """Train to a step (counted from the run's beginning) or to the end, and save the states that are due."""
        run, last = self.run, self.run.length.steps if until is None else until
        size = run.options[RunOptions].gradient_accumulation_steps
        for epoch, batches in epochs_of(run.data, run.length.epochs, run.accelerator, run.epoch, run.taken):
            run.epoch = epoch
            run.trained.network.on_epoch_start()
            group = []
            ended = run.data.batches_per_epoch(run.accelerator.num_processes)
            for batch in batches:
                group.append(batch)
                if len(group) == size or run.taken + len(group) == ended:
                    update(run, group)
                    run.taken, group = run.taken + len(group), []
                    keep_state(run, self.states, "step")
                    if run.step == last:
                        return self
            keep_state(run, self.states, "epoch")
            run.taken = 0
        return self


def options_with_states(family: SmallFamily, images: Path, output: Path, *extra: str, module: str = "networks.lora") -> OptionSet:
    """The options of a small run, those of states among them."""
    argv = [
        *family.files, "--dataset_config", str(images / "dataset.toml"), "--output_dir", str(output), "--output_name", "net",
        "--network_module", module, "--network_dim", "2", "--seed", "1", "--learning_rate", "1e-2", "--max_data_loader_n_workers", "0",
        *extra,
    ]  # fmt: skip
    return parse_command_line(option_groups(family.arch), argv, prog="test", about="test", refuse=refused_options(family.arch))


def begun(family: SmallFamily, images: Path, output: Path, *extra: str, module: str = "networks.lora") -> StoppedRun:
    """A run that is set up, and taken up where `--resume` says so: what `train` does before its first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = options_with_states(family, images, output, *extra, module=module)
    accelerator = make_accelerator(options)
    run = set_up(preflight(family.arch, options, accelerator, Team.of(accelerator)))
    return StoppedRun(run, run.states, resume(run, run.states))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Are these the same bytes under the same names?"""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
