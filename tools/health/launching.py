"""accelerate's configuration: what `accelerate launch` takes from it without being told."""

from collections.abc import Iterator
from pathlib import Path

import torch

from tools.health.finding import Finding, Patient, fail, first_line, ok, warn

SUBJECT = "accelerate launch"


def launching(patient: Patient) -> Iterator[Finding]:
    """The stored configuration against the devices there are."""
    from accelerate.commands.config import config_args

    file = Path(config_args.default_config_file)
    if not file.is_file():
        yield ok(SUBJECT, "no stored configuration: its command line decides, and by default one process is started for each GPU")
        return
    try:
        config = config_args.load_config_from_file(str(file)).to_dict()
    except Exception as error:  # a file of another version, or no YAML
        yield fail(SUBJECT, f"{file}: {first_line(error)}", "run `accelerate config` again, or remove the file")
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    processes, machines = int(config.get("num_processes") or 1), int(config.get("num_machines") or 1)
    kind = str(config.get("distributed_type", "NO")).rpartition(".")[2]
    text = f"{file}: {kind}, {processes} processes, --mixed_precision {config.get('mixed_precision') or 'no'}"
    if kind == "MULTI_GPU" and gpus and processes > machines * gpus:
        yield fail(SUBJECT, f"{text}, but {gpus} GPUs", "run `accelerate config` again, or give --num_processes")
    elif kind == "MULTI_GPU" and not gpus:
        yield warn(SUBJECT, f"{text}, but no GPU", "run `accelerate config` again")
    else:
        yield ok(SUBJECT, text)
