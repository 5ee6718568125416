"""Several processes: what the user may say of how they exchange gradients."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from library.core.options import declared, option


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

    def check(self) -> Iterable[str]:
        """What is wrong: a wait that is none."""
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

    def in_vain(self, processes: int) -> Iterator[str]:
        """One sentence for every option that was given to a run of one process."""
        for entry in declared(type(self)) if processes == 1 else ():
            if getattr(self, entry.name):
                yield f"--{entry.name} has no effect: this run has one process"
