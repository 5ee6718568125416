"""The learning rates that an optimizer really used, for trackers."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from library.training.optimizing.averaging import innermost


def effective_rates(optimizer: Optimizer, names: Sequence[str]) -> dict[str, float]:
    """Tracker entries of the last step: `lr/<group>`, and `lr/d*lr/<group>` where the optimizer estimates a factor d.

    To be asked after `optimizer.step()` and before the schedule's. `names` are those of the groups, in their order.
    """
    inner, entries = innermost(optimizer), {}
    for name, group in zip(names, inner.param_groups, strict=True):
        rate = _rate(inner, group)
        entries[f"lr/{name}"] = rate
        if "d" in group:
            entries[f"lr/d*lr/{name}"] = float(group["d"]) * rate
    return entries


def _rate(optimizer: Any, group: dict[str, Any]) -> float:
    if group.get("relative_step"):  # Adafactor: a rate for each tensor; the first one's stands for all
        states = [optimizer.state[parameter] for parameter in group["params"] if "step" in optimizer.state.get(parameter, {})]
        return float(optimizer._get_lr(group, states[0])) if states else 0.0
    warmed = group.get("scheduled_lr") if group.get("train_mode") is not None else None  # schedule-free optimizers warm up themselves
    return float(warmed or group["lr"])
