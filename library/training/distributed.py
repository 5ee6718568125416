"""Several processes: what the user may say of how they exchange gradients."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Literal

from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from library.core.options import declared, option
from library.core.rules import Rule

ZERO = (
    "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path",
    "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients",
)  # fmt: skip
"""The options that say how DeepSpeed works."""


@dataclass(kw_only=True, frozen=True)
class DistributedOptions:
    """Several processes."""

    ddp_timeout: int | None = option(
        None, help="minutes that a process waits for the others before it gives up; torch's own limit if absent"
    )
    ddp_gradient_as_bucket_view: bool = option(False, help="gradients are views of what is exchanged: less memory, one copy less")
    ddp_static_graph: bool = option(
        False, help="tell DDP that every step uses the same parameters, so that it need not look for unused ones"
    )

    deepspeed: bool = option(False, help="let DeepSpeed's ZeRO share out optimizer states, gradients and weights; pip install deepspeed")
    zero_stage: Literal[0, 1, 2, 3] = option(
        2, help="what ZeRO shares out: 1 optimizer states, 2 gradients too, 3 the base's weights too; 0 nothing"
    )
    offload_optimizer_device: Literal["cpu", "nvme"] | None = option(None, help="where ZeRO keeps optimizer states; stages 1 to 3")
    offload_optimizer_nvme_path: str | None = option(None, help="folder on the disk for --offload_optimizer_device nvme")
    offload_param_device: Literal["cpu", "nvme"] | None = option(None, help="where ZeRO stage 3 keeps weights between their uses")
    offload_param_nvme_path: str | None = option(None, help="folder on the disk for --offload_param_device nvme")
    zero3_init_flag: bool = option(False, help="accepted for sd-scripts' commands; models are read as always, then shared out")
    zero3_save_16bit_model: bool = option(False, help="accepted for sd-scripts' commands; the network is always saved whole")
    fp16_master_weights_and_gradients: bool = option(False, help="accepted for sd-scripts' commands; adapters stay float32")
    RULES: ClassVar[tuple[Rule, ...]] = (
        *(Rule(option=name, when=lambda v: not v["deepspeed"], because="it is for --deepspeed") for name in ZERO),
        Rule(option="zero3_init_flag", when=lambda v: v["deepspeed"], because="models are read as always, then shared out"),
        Rule(option="zero3_save_16bit_model", when=lambda v: v["deepspeed"], because="the network is always saved whole"),
        Rule(option="fp16_master_weights_and_gradients", when=lambda v: v["deepspeed"], because="adapters stay float32 with DeepSpeed"),
    )

    def check(self) -> Iterable[str]:
        """What is wrong: a wait that is none, offloading that the stage has not, or without a place."""
        if self.deepspeed and self.zero_stage == 0 and self.offload_optimizer_device:
            yield f"--offload_optimizer_device {self.offload_optimizer_device}: needs --zero_stage 1, 2 or 3"
        if self.deepspeed and self.zero_stage != 3 and self.offload_param_device:
            yield f"--offload_param_device {self.offload_param_device}: needs --zero_stage 3, not {self.zero_stage}"
        for what in ("optimizer", "param"):
            device, path = getattr(self, f"offload_{what}_device"), getattr(self, f"offload_{what}_nvme_path")
            if (device == "nvme") != (path is not None):
                yield f"--offload_{what}_device nvme and --offload_{what}_nvme_path FOLDER need each other"
        if self.ddp_timeout is not None and self.ddp_timeout < 1:
            yield f"--ddp_timeout {self.ddp_timeout}: minutes, at least 1"

    def handlers(self) -> list[KwargsHandler]:
        """The same for `accelerate.Accelerator(kwargs_handlers=...)`."""
        # a network may hold adapters that never get a gradient: a family need not use the last layers of its text encoders
        ddp = DistributedDataParallelKwargs(
            find_unused_parameters=not self.ddp_static_graph,
            gradient_as_bucket_view=self.ddp_gradient_as_bucket_view,
            static_graph=self.ddp_static_graph,
        )
        return [ddp] if self.ddp_timeout is None else [ddp, InitProcessGroupKwargs(timeout=timedelta(minutes=self.ddp_timeout))]

    def zero_settings(self) -> dict[str, Any]:
        """DeepSpeed's section `zero_optimization` for these options."""
        settings: dict[str, Any] = {"stage": self.zero_stage}
        for what in ("optimizer", "param"):
            device, path = getattr(self, f"offload_{what}_device"), getattr(self, f"offload_{what}_nvme_path")
            if device is not None:
                settings[f"offload_{what}"] = {"device": device} | ({"nvme_path": path} if path else {})
        return settings

    def in_vain(self, processes: int) -> Iterator[str]:
        """One sentence for every option that was given to a run of one process."""
        for entry in declared(type(self)) if processes == 1 else ():
            if getattr(self, entry.name) and entry.name not in ("deepspeed", *ZERO):  # which have rules
                yield f"--{entry.name} has no effect: this run has one process"
