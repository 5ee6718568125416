"""One optimizer step: forward, backward, what may not be finite, the update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from library.core.log import get_logger
from library.core.options import option
from library.data.batch import Batch
from library.training.adapters import NetworkOptions
from library.training.optimizing.optimizer import OptimizerOptions
from library.training.optimizing.rates import effective_rates
from library.training.parallel.shares import counted
from library.training.setup import Run
from library.training.step import acting_at, batch_loss

logger = get_logger(__name__)
MOST_SKIPPED = 20  # steps in a row that `--nan_policy skip` leaves out before it gives up
CAPTION_SHOWN = 120  # letters


@dataclass(kw_only=True, frozen=True)
class FaultOptions:
    """Faults in a step."""

    nan_policy: Literal["stop", "skip"] = option(
        "stop",
        help="what a loss or gradient does that is not finite: stop ends the run before the update, skip goes on without it "
        f"(at most {MOST_SKIPPED} times in a row); both name the step and its images",
    )


class NonFinite(ValueError):
    """A loss or gradient that is not finite. No such gradient reached a weight."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a batch's losses."""

    mean: float
    is_finite: bool
    asked_to_end: bool


def update(run: Run, batches: Sequence[Batch]) -> dict[str, float]:
    """One optimizer step over the mean loss of some batches; returns its figures by tracker key.

    Raises `NonFinite` on every rank, before the update, where a loss or the norm of the gradients is not finite (`--nan_policy`). A fused
    backward pass has then updated what had finite gradients.
    """
    total, fault = _backward(run, batches)
    updated = "nothing was updated"
    norm = None if fault else _clipped(run)
    if norm is not None and not math.isfinite(norm) and run.accelerator.scaler is None:  # fp16's scaler expects such and steps over them
        fault = f"the gradient became {norm}"
    if run.fused is not None and run.fused.take():
        fault, updated = "a gradient became nan or inf", "such gradients counted as zero in the fused backward pass"
    if fault is not None:
        _refuse(run, fault, batches, updated)
    else:
        run.skipped = 0
        if run.fused is None:  # else the backward pass has stepped every weight
            later = run.engine.step(run.context.model, run.optimizer)
            norm = later if norm is None else norm
    rates = effective_rates(run.optimizer, run.trained.group_names)
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if fault is not None:
        return run.progress.skip(rates) | run.instruments.figures(run.step)
    norms = ({} if norm is None else {"norm/gradient": norm}) | _bound_norms(run)
    if run.average is not None:
        run.average.update()
    return run.progress.update(total, rates) | norms | run.instruments.figures(run.step)


def agreed(accelerator: Accelerator, loss: float, asked_to_end: bool) -> Agreed:
    """The mean loss over all ranks, whether every one is finite, and whether any rank was asked to end: one exchange of three numbers."""
    own = torch.tensor([loss if math.isfinite(loss) else 0.0, not math.isfinite(loss), asked_to_end], device=accelerator.device)
    if accelerator.num_processes > 1:
        own = accelerator.reduce(own, "sum")
        assert isinstance(own, torch.Tensor)
    mean, faults, askers = own.tolist()
    return Agreed(loss if accelerator.num_processes == 1 else mean / accelerator.num_processes, not faults, bool(askers))


def _backward(run: Run, batches: Sequence[Batch]) -> tuple[float, str | None]:
    """Gradients of the mean loss; returns it, and what is wrong with it. Where a loss is not finite no gradient is made of it."""
    total, count = 0.0, counted(batches, run.data.batches_per_epoch(), run.accelerator.num_processes)
    run.trained.network.on_step_start()
    for index, batch in enumerate(batches):
        is_last = index + 1 == len(batches)
        strength = acting_at(run.context, batch.network_multiplier)
        with run.engine.synchronised(run.context.model, is_last=is_last), strength:
            losses = batch_loss(run.context, batch)
            loss = losses.mean
            own = loss.detach().item()
            known = agreed(run.accelerator, own, run.interruption.asked)
            run.interruption.agree(known.asked_to_end)
            if not known.is_finite:
                return math.nan, f"the loss became {own}" if not math.isfinite(own) else "the loss of another rank is not finite"
            total += known.mean / count
            run.instruments.see_loss(losses, batch)
            run.engine.backward(run.context.model, loss / count, is_last=is_last)
    run.engine.share_gradients(run.trained.parameters)
    return total, None


def _clipped(run: Run) -> float | None:
    """Clip the gradients; returns their norm before it, or None where it is never known."""
    options = run.options[OptimizerOptions]
    if options.fused_backward_pass:
        return None
    norm = run.engine.clip(run.context.model, run.trained.parameters, options.max_grad_norm)
    run.instruments.see_gradients(run.step + 1, norm, options.max_grad_norm)
    return norm


def _refuse(run: Run, fault: str, batches: Sequence[Batch], updated: str) -> None:
    """Say what was not finite, with which images and captions of all ranks; raise where that ends the run."""
    own = [seen for batch in batches for seen in zip(batch.images, batch.captions, strict=True)]
    every = list(dict.fromkeys(gather_object(own)))
    lines = "\n".join(f"  {image}: {caption[:CAPTION_SHOWN]!r}" for image, caption in every)
    run.skipped += 1
    sentence = f"{fault} at step {run.step + 1}; {updated}. The images of the step and their captions:\n{lines}"
    if run.options[FaultOptions].nan_policy == "stop":
        raise NonFinite(f"{sentence}\n--nan_policy skip leaves such steps out; a lower --learning_rate may keep them from happening")
    if run.skipped > MOST_SKIPPED:
        raise NonFinite(f"{sentence}\nthe {MOST_SKIPPED} steps before it were left out for the same reason")
    run.log.event("left_out", run.step + 1, run.epoch, reason=fault, images=[image for image, _ in every])
    if run.accelerator.is_main_process:
        logger.warning("%s", sentence)


def _bound_norms(run: Run) -> dict[str, float]:
    """Keep the deltas within `--scale_weight_norms`; returns how many were shrunk and their norms, by tracker key."""
    limit = run.options[NetworkOptions].scale_weight_norms
    if limit is None:
        return {}
    shrunk, mean, largest = run.trained.network.apply_max_norm_regularization(limit, run.accelerator.device)
    return {"max_norm/keys_scaled": shrunk, "max_norm/average_key_norm": mean, "max_norm/max_key_norm": largest}
