"""What is done between optimizer steps: the network is saved first, then the run's state, then validation and previews look at it.

So the trained file comes before all that may fail, and a state stands between saving and looking: a resumed run begins by looking at the
moment in which its state was saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from library.core.log import get_logger
from library.inference.generate import Generator
from library.training.interruption import EXIT_INTERRUPTED
from library.training.metadata import MetadataOptions, file_metadata
from library.training.optimizing.average import average_shown, averaged_file
from library.training.optimizing.averaging import averaged
from library.training.setup import Run
from library.training.state.saving import keep_state, save_state
from library.training.state.states import Moment
from library.training.tracking.trackers import send
from library.training.validation import ValidationOptions, validate

logger = get_logger(__name__)


def after_step(run: Run) -> None:
    """What is due after an optimizer step. Raises `SystemExit` where the run was asked to end."""
    if run.step == run.length.steps:
        save(run, run.saver.final_file())
    elif run.saver.due_after_step(run.step):
        save(run, run.saver.step_file(run.step))
        remove(run, run.saver.outdated_step_file(run.step))
    kept = keep_state(run, run.states, "step")
    if run.interruption.ends_run and run.step < run.length.steps:
        leave(run, kept)
    look(run, "step")


def after_epoch(run: Run) -> None:
    """What is due after an epoch."""
    record(run, run.progress.epoch_figures())
    if run.saver.due_after_epoch(run.epoch, run.length.epochs):
        save(run, run.saver.epoch_file(run.epoch))
        remove(run, run.saver.outdated_epoch_file(run.epoch, run.length.epochs))
    keep_state(run, run.states, "epoch")
    look(run, "epoch")


def leave(run: Run, kept: Path | None) -> NoReturn:
    """End the run that was asked to, with a state to go on from: the one that was just saved, or a new one."""
    place = kept or keep_interrupted(run)
    if place is not None:
        logger.warning("interrupted after step %d; the same command with --resume %s goes on", run.step, place)
    raise SystemExit(EXIT_INTERRUPTED)


def keep_interrupted(run: Run) -> Path | None:
    """Save the state of a run that ends before its time; where that cannot be, the trained weights at least."""
    try:
        return save_state(run, run.states, "interrupted")
    except ValueError as problem:
        logger.warning("%s", problem)
        save(run, run.saver.step_file(run.step))
        return None


def look(run: Run, moment: Moment) -> None:
    """Measure validation and draw previews where they are due, unless the run was asked to end. Neither changes anything of the run."""
    if run.interruption.ends_run:
        return
    validation, previews = run.options[ValidationOptions], run.previews
    is_step = moment == "step"
    if validation.due_after_step(run.step) if is_step else validation.due_after_epoch(run.epoch):
        measure_validation(run, moment)
    if previews.due_after_step(run.step) if is_step else previews.due_after_epoch(run.epoch):
        preview(run, f"{run.step:06d}" if is_step else f"e{run.epoch:06d}")


def record(run: Run, figures: dict[str, float]) -> None:
    """Send figures of the step that was made to the log and to every tracker."""
    run.log.record(run.step, run.epoch, figures)
    send(run.accelerator, figures, run.step)


def save(run: Run, path: Path) -> None:
    """Write the network as it is now, and beside it the average of its weights where there is one; one process writes, all wait."""
    with run.engine.whole(run.context.model):
        if run.accelerator.is_main_process:
            with averaged(run.optimizer):
                _write(run, path)
            if run.average is not None:
                with run.average.shown():
                    _write(run, averaged_file(path))
        run.team.meet(f"{path.name} is saved")


def _write(run: Run, path: Path) -> None:
    """Write one file. Where that fails the run goes on, for the file before it is whole; only the last one must succeed."""
    no_metadata = run.options[MetadataOptions].no_metadata
    entries = file_metadata(run.metadata, steps=run.step, epoch=run.epoch, no_metadata=no_metadata)
    try:
        run.trained.network.save_weights(str(path), run.saver.dtype, entries)
    except ValueError as error:
        if run.step == run.length.steps:
            raise
        logger.warning("%s; the run goes on", error)
        run.log.event("warning", run.step, run.epoch, reason=str(error))
        return
    run.log.event("saved", run.step, run.epoch, file=path.name)
    logger.info("saved %s (step %d)", path, run.step)
    if run.uploads is not None:
        run.uploads.send(path, "network")


def remove(run: Run, outdated: Path | None) -> None:
    """Remove a saved file and the average beside it, where they are there; what is still on its way to the hub, after that."""
    for path in (outdated, averaged_file(outdated)) if outdated is not None and run.accelerator.is_main_process else ():
        if path.exists():
            logger.info("removing %s", path.name)
            try:
                path.unlink() if run.uploads is None else run.uploads.release(path, path.unlink)
            except OSError as error:
                logger.warning("%s could not be removed (%s); the run goes on", path, error.strerror or error)


@contextmanager
def shown(run: Run) -> Iterator[None]:
    """Within it this rank can draw and measure alone, with the weights that the run is meant to give: averaged ones where there are any."""
    with run.engine.alone(run.context.model), averaged(run.optimizer), average_shown(run.average):
        yield


def preview(run: Run, moment: str) -> None:
    """Draw the previews with the network as it is now; one process draws, all wait."""
    with shown(run):
        if run.accelerator.is_main_process:
            generator = Generator(
                arch=run.arch,
                models=run.trained.models,
                model_options=run.context.model_options,
                device=run.accelerator.device,
                dtype=torch.float32,
            )
            fixed = not run.trained.trains_text_encoders
            with run.accelerator.autocast():
                files = run.previews.draw(
                    generator, run.trained.network, moment, text_is_fixed=fixed, asked_to_end=lambda: run.interruption.asked
                )
            run.log.event("previews", run.step, run.epoch, files=[file.name for file in files])
        run.team.meet(f"previews {moment}")


def measure_validation(run: Run, moment: Moment) -> None:
    """Log the loss on the images that are held out, where there are any; `moment` is what ended."""
    if run.data.validation is not None:
        most = run.options[ValidationOptions].max_validation_steps
        with shown(run):
            figures = validate(run.context, run.data.validation, run.accelerator, moment, most=most)
        record(run, figures)
