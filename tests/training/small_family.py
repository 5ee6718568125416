"""A family with its tiny model, ready to be trained in this process."""

from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState

from library.core.command_line import OptionSet, parse_command_line
from library.models.architecture import Architecture
from library.training.retired import refused_options
from library.training.run import RunResult, option_groups, train


@dataclass(frozen=True)
class SmallFamily:
    """A family, and the options that name its tiny model."""

    arch: Architecture
    files: tuple[str, ...]

    def options(self, images: Path, output: Path, *extra: str, module: str = "networks.loha") -> OptionSet:
        """A run's options: rank 2, seed 1, in this process."""
        argv = [
            *self.files, "--dataset_config", str(images / "dataset.toml"), "--output_dir", str(output),
            "--output_name", "net", "--network_module", module, "--network_dim", "2", "--seed", "1", "--learning_rate", "1e-2",
            "--max_data_loader_n_workers", "0", *extra,
        ]  # fmt: skip
        return parse_command_line(option_groups(self.arch), argv, prog="test", about="test", refuse=refused_options(self.arch))

    def run(self, images: Path, output: Path, *extra: str, module: str = "networks.loha") -> RunResult:
        """Train. Accelerate keeps one state a process; a script starts anew for each run, and so does this."""
        AcceleratorState._reset_state(reset_partial_state=True)
        return train(self.arch, self.options(images, output, *extra, module=module))
