"""A run's folders as training leaves them, made by hand: log, lock file, saved files, previews, images."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from small_adapters import write_adapter

from library.training.reproduction.inputs import Input
from library.training.reproduction.lock import Lock, write_lock

BANDS = ("0-250", "250-500", "500-750", "750-1000")
PROMPT = "a red <cat> & a dog"


def write_run(folder: Path, modules: SimpleNamespace, checkpoint: Path, *, name: str = "net", steps: int = 6) -> Path:
    """A finished run of two epochs with a preview at two strengths after each; returns the output folder."""
    own = folder / f"{name}-run"
    own.mkdir(parents=True)
    entries: list[Mapping[str, Any]] = [{"event": "begun", "step": 0, "epoch": 1, "seconds": 0.0}]
    for step in range(1, steps + 1):
        epoch = 1 if step <= steps // 2 else 2
        entries.append({"step": step, "epoch": epoch, "seconds": 0.5 * step, **figures(step)})
    entries.append({"event": "saved", "step": steps, "epoch": 2, "seconds": 4.0, "file": f"{name}.safetensors"})
    (own / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_lock(small_lock(checkpoint, write_images(folder.parent / "images"), name, steps), own, resumes=False)
    for file, algorithm in ((f"{name}-000001.safetensors", "lora"), (f"{name}.safetensors", "loha")):
        write_adapter(folder / file, modules, algorithm)
    for moment in ("e000001", "e000002"):
        for strength in ("0.5", "1"):
            write_preview(folder / "sample" / f"{name}_{moment}_00_x{strength}_20260102030405_7.png")
    return folder


def figures(step: int) -> dict[str, float]:
    """The figures of a step, by the keys that training logs."""
    bands = {f"loss/band/{band}": 1 / (place + step) for place, band in enumerate(BANDS, 1)}
    norms = {"norm/gradient": 1.0 / step, "norm/gradient/unet/attention": 0.5 / step, "norm/weight/unet/mlp": 2.0 + step}
    speed = {"speed/images_per_second": 4.0, "speed/step_seconds": 0.5, "memory/process_peak": 1.5, "lr/unet": 1e-3 / step}
    return {"loss/current": 1 / step, "loss/average": 1.1 / step, **bands, **norms, **speed}


def small_lock(checkpoint: Path, dataset: Path, name: str, steps: int) -> Lock:
    """A lock file of a run on a tiny SDXL."""
    return Lock(
        run={"family": "sdxl", "seed": 7, "processes": 1, "steps": steps, "started": "2026-01-02T03:04:05", "command": ["train.py", "--x"]},
        options={
            "pretrained_model_name_or_path": str(checkpoint), "dataset_config": str(dataset), "network_module": "networks.lora", "seed": 7,
        },
        defaults={"max_grad_norm": 1.0},
        versions={"torch": "2.13.0"},
        hardware={"device": "cpu", "threads": 1},
        environment={"OMP_NUM_THREADS": "1"},
        inputs={"images:1.1": Input(place="images", digest="ab" * 32, images=2)},
    )  # fmt: skip


def write_images(folder: Path) -> Path:
    """Two pictures with captions; returns their dataset file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        Image.effect_noise((64, 64), 60 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture <number> {number}")
    path = folder / "data.toml"
    path.write_text(f"[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n")
    return path


def write_preview(path: Path) -> None:
    """A picture with its prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text("prompt", PROMPT)
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, pnginfo=info)
