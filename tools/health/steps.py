"""One real training step of every family with every algorithm, on the small models that come with the project.

Each device has a process of its own (`python -m tools.health.steps`), so that a library which crashes does not end the doctor.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from library.core.command_line import parse_command_line
from library.core.tensor_file import load_tensors
from library.models.architecture import architecture_named
from library.training.run import option_groups, train
from networks.protocol import network_modules
from tools.demo import MODELS
from tools.health.finding import Finding, Patient, fail, ok, warn

ROOT = Path(__file__).parent.parent.parent
SIDE = 64
LONGEST = 300  # seconds


def steps(patient: Patient) -> Iterator[Finding]:
    """A step on every device."""
    if missing := [file for files in MODELS.values() for file in files if file.startswith("assets/") and not (ROOT / file).is_file()]:
        yield warn("training step", f"not tried: {missing[0]} is missing", "run the doctor from the project's own folder")
        return
    families = [patient.family] if patient.family is not None else list(MODELS)
    for device in patient.devices:
        yield from _on(device, families)


def _on(device: torch.device, families: Sequence[str]) -> Iterator[Finding]:
    """The findings of the process that trains on this device."""
    subject = f"training step on {device}"
    hidden = {"ACCELERATE_USE_CPU": "1"} if device.type == "cpu" else {}
    if device.type == "cuda":
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        hidden["CUDA_VISIBLE_DEVICES"] = visible[device.index] if visible else str(device.index)
    command = [sys.executable, "-m", "tools.health.steps", device.type, *families]
    try:
        ran = subprocess.run(command, cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        yield fail(subject, f"took more than {LONGEST} s", "look whether the device hangs (nvidia-smi, dmesg)")
        return
    found = [Finding(**json.loads(line)) for line in ran.stdout.splitlines() if line.startswith("{")]
    yield from found
    if ran.returncode != 0:
        last = next(reversed(ran.stderr.strip().splitlines()), "it said nothing")
        yield fail(subject, f"ended with status {ran.returncode}: {last}", "the packages do not fit this device: see the lines above")


def main(argv: Sequence[str]) -> None:
    """Train on the kind of device that the first argument names, the families that follow; one JSON line for each algorithm."""
    kind, *families = argv
    dtype = _dtype(kind)
    with tempfile.TemporaryDirectory() as place:
        dataset = _dataset(Path(place))
        for family in families:
            for module in network_modules():
                print(json.dumps(vars(_step(family, module, dtype, kind, dataset))), flush=True)


def _dtype(kind: str) -> str:
    """The mixed precision that a user of this device would take."""
    if kind != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _dataset(folder: Path) -> Path:
    Image.effect_noise((SIDE, SIDE), 50).convert("RGB").save(folder / "a.png")
    (folder / "a.txt").write_text("a picture")
    file = folder / "dataset.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\n"
    file.write_text(f"[general]\nresolution = {SIDE}\n[[datasets]]\nbatch_size = 1\n{subset}")
    return file


def _step(family: str, module: str, dtype: str, kind: str, dataset: Path) -> Finding:
    """Train one step with the real training code, and look at its loss and its file."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one a process
    arch = architecture_named(family)
    options = parse_command_line(
        option_groups(arch),
        [
            *MODELS[family], "--dataset_config", str(dataset), "--output_dir", str(dataset.parent / "out"), "--seed", "1",
            "--network_module", module, "--network_dim", "2", "--max_train_steps", "1", "--learning_rate", "1e-3",
            "--mixed_precision", dtype, "--max_data_loader_n_workers", "0", "--console_log_level", "WARNING",
        ],
        prog="tools.health.steps", about="",
    )  # fmt: skip
    started = time.perf_counter()
    result = train(arch, options)
    seconds = time.perf_counter() - started
    subject, text = (
        f"a step of {family} with {module} on {kind}",
        f"loss {result.losses[0]:.4f} with --mixed_precision {dtype}; {seconds:.1f} s with loading",
    )
    if not math.isfinite(result.losses[0]) or not all(bool(tensor.isfinite().all()) for tensor in load_tensors(result.file).values()):
        return fail(subject, text, "numbers are not finite here: try --mixed_precision no, and update torch and the driver")
    return ok(subject, text)


if __name__ == "__main__":
    main(sys.argv[1:])
