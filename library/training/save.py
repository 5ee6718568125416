"""When and where the network is saved: file names, rotation, precision, as sd-scripts names them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from library.core.atomic import writable_folder
from library.core.devices import dtype_named
from library.core.disk_space import lacking
from library.core.options import option


@dataclass(kw_only=True, frozen=True)
class SaveOptions:
    """Saving."""

    output_dir: str = option(help="folder for the trained files; made if missing")
    output_name: str | None = option(None, help="name of the files without extension; last, epoch, at where absent")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, help="dtype of the saved weights; as they are trained where absent"
    )
    save_model_as: Literal["safetensors"] = option("safetensors", help="file format; pickles are not written")
    save_every_n_epochs: int | None = option(None, help="also save after every n epochs")
    save_every_n_steps: int | None = option(None, help="also save after every n optimizer steps")
    save_n_epoch_ratio: int | None = option(
        None, help="also save at least n times in the run, after epochs; in place of --save_every_n_epochs"
    )
    save_last_n_epochs: int | None = option(None, help="keep the epoch files of the last n epochs only")
    save_last_n_steps: int | None = option(None, help="keep the step files of the last n steps only")

    def dtype(self, trained: torch.dtype) -> torch.dtype:
        """The dtype of saved weights that train in `trained`."""
        return trained if self.save_precision is None else dtype_named(self.save_precision)

    def check(self) -> Iterable[str]:
        """What is wrong: zero intervals, a rotation without what it rotates, a name that is a path."""
        for name in ("save_every_n_epochs", "save_n_epoch_ratio", "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name} {value}: must be at least 1"
        if self.save_every_n_epochs is not None and self.save_n_epoch_ratio is not None:
            yield "--save_every_n_epochs and --save_n_epoch_ratio exclude each other: both say after which epochs"
        if self.save_last_n_epochs is not None and self.save_every_n_epochs is None and self.save_n_epoch_ratio is None:
            yield "--save_last_n_epochs has no effect without --save_every_n_epochs or --save_n_epoch_ratio"
        if self.save_last_n_steps is not None and self.save_every_n_steps is None:
            yield "--save_last_n_steps has no effect without --save_every_n_steps"
        if self.output_name is not None and Path(self.output_name).name != self.output_name:
            yield f"--output_name {self.output_name}: a name without folders; put the folder into --output_dir"


class Saver:
    """Knows the files of one run. Raises `ValueError` at once where the output folder cannot be written to or is full."""

    def __init__(self, options: SaveOptions, trained_dtype: torch.dtype = torch.float32) -> None:
        self.options = options
        self.folder = writable_folder(options.output_dir, "--output_dir")
        if (problem := lacking(self.folder, 0, "a run")) is not None:
            raise ValueError(f"--output_dir {self.folder}: {problem}; make room or choose another folder")
        self.dtype = options.dtype(trained_dtype)

    @property
    def run_folder(self) -> Path:
        """Where the run's log, lock file and report stand: `<output_name>-run`."""
        return self.folder / f"{self.options.output_name or 'last'}-run"

    def final_file(self) -> Path:
        """The trained network: `<output_name>.safetensors`, `last.safetensors` without a name."""
        return self.folder / f"{self.options.output_name or 'last'}.safetensors"

    def epoch_file(self, epoch: int) -> Path:
        """The file of a finished epoch, counted from 1: `<output_name>-000001.safetensors`."""
        return self.folder / f"{self.options.output_name or 'epoch'}-{epoch:06d}.safetensors"

    def step_file(self, step: int) -> Path:
        """The file after an optimizer step: `<output_name>-step00000100.safetensors`."""
        return self.folder / f"{self.options.output_name or 'at'}-step{step:08d}.safetensors"

    def due_after_step(self, step: int) -> bool:
        """Shall the network be saved after this step?"""
        return bool(self.options.save_every_n_steps) and step % (self.options.save_every_n_steps or 1) == 0

    def every_n_epochs(self, last_epoch: int) -> int | None:
        """After how many epochs of a run of `last_epoch` the network is saved, or None."""
        ratio = self.options.save_n_epoch_ratio
        return self.options.save_every_n_epochs if ratio is None else max(1, last_epoch // ratio)

    def due_after_epoch(self, epoch: int, last_epoch: int) -> bool:
        """Shall the network be saved after this epoch? Not after the last: that is the final file."""
        every = self.every_n_epochs(last_epoch)
        return every is not None and epoch < last_epoch and epoch % every == 0

    def outdated_epoch_file(self, epoch: int, last_epoch: int) -> Path | None:
        """The epoch file that falls out of `--save_last_n_epochs` once that of `epoch` is safe."""
        every, keep = self.every_n_epochs(last_epoch), self.options.save_last_n_epochs
        return self.epoch_file(epoch - every * keep) if every and keep else None

    def outdated_step_file(self, step: int) -> Path | None:
        """The step file that falls out of `--save_last_n_steps` (a span of steps, not a number of files)."""
        every, span = self.options.save_every_n_steps, self.options.save_last_n_steps
        return self.step_file((step - span - 1) // every * every) if every and span and step > span else None
