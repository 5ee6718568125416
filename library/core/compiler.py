"""Whether torch.compile works on this machine."""

import torch

from library.core.spelling import unknown


def check_compiler(device: torch.device, backend: str = "inductor", *, flag: str = "--compile") -> None:
    """Compile something small, to know now rather than after loading. Raises `ValueError` for what does not work here."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing compiler, driver or header makes torch raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{flag}: torch.compile does not work on {device} here ({reason}); leave it out") from error


def backend_problem(backend: str) -> str | None:
    """What is wrong with the name of a compiler's backend, or None where there is one of this name."""
    names = [*torch.compiler.list_backends(exclude_tags=())]
    return None if backend in names else unknown(backend, names, "backend")
