"""The demo: teach a small built-in model a new look with the real scripts, draw with and without it, and measure.

    python run.py demo [--family anima]

It writes `demo_output/demo.png` (the dataset, then the same prompts without the adapter, at strength 0.5 and at 1.0) and
`demo_output/scores.json`. Nothing is hidden: the commands are printed as a user would type them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tools.toys.pictures import (
    BACKGROUNDS,
    COLOURS,
    NEW_LOOK_WORD,
    SHAPES,
    Picture,
    caption,
    draw,
    has_new_look,
    random_picture,
    read,
    with_new_look,
)

ROOT = Path(__file__).parent.parent
CELL, MARGIN, COLUMNS = 96, 6, 8
TAUGHT, ORDINARY = 16, 8  # pictures of the new look, and ordinary ones that show what must stay as it is


@dataclass(kw_only=True, frozen=True)
class Demo:
    """What differs between families: the arguments of their scripts."""

    train: tuple[str, ...]
    generate: tuple[str, ...]
    into: tuple[str, ...]  # before the folder of the pictures
    adapter: Callable[[str, float], tuple[str, ...]]  # the arguments for an adapter file at a strength


ANIMA = "assets/toy_anima"
TRAINING = (
    "--optimizer_type", "AdamW", "--lr_scheduler", "cosine", "--lr_warmup_steps", "5%", "--mixed_precision", "no",
    "--cache_latents", "--vae_batch_size", "8", "--seed", "1",
)  # fmt: skip
MODELS: dict[str, tuple[str, ...]] = {
    "sdxl": ("--pretrained_model_name_or_path", "assets/toy_sdxl.safetensors"),
    "anima": (
        "--pretrained_model_name_or_path", f"{ANIMA}/dit.safetensors",
        "--qwen3", f"{ANIMA}/qwen3.safetensors", "--vae", f"{ANIMA}/vae.safetensors",
    ),
}  # fmt: skip
"""The small model of each family, as its training script's options name it in the project folder."""

DEMOS = {
    "sdxl": Demo(
        train=(
            "sdxl_train_network.py", *MODELS["sdxl"],
            "--network_module", "networks.loha", "--network_dim", "8", "--network_alpha", "4",
            "--learning_rate", "1e-3", "--max_train_steps", "600", *TRAINING,
        ),
        generate=(
            "gen_img.py", "--ckpt", "assets/toy_sdxl.safetensors", "--W", "64", "--H", "64", "--steps", "25", "--scale", "4",
            "--sampler", "ddim", "--batch_size", "16",
        ),
        into=("--sequential_file_name", "--outdir"),
        adapter=lambda file, strength: ("--network_module", "networks.loha", "--network_weights", file, "--network_mul", str(strength)),
    ),
    "anima": Demo(
        train=(
            "anima_train_network.py", *MODELS["anima"],
            "--network_module", "networks.lokr", "--network_dim", "8", "--network_alpha", "4", "--network_args", "factor=4",
            "--learning_rate", "2e-3", "--max_train_steps", "450", *TRAINING,
        ),
        generate=(
            "anima_minimal_inference.py", "--dit", f"{ANIMA}/dit.safetensors", "--text_encoder", f"{ANIMA}/qwen3.safetensors",
            "--vae", f"{ANIMA}/vae.safetensors", "--image_size", "64", "64", "--infer_steps", "20", "--guidance_scale", "4",
            "--flow_shift", "1", "--batch_size", "16",
        ),
        into=("--save_path",),
        adapter=lambda file, strength: ("--lora_weight", file, "--lora_multiplier", str(strength)),
    ),
}  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class Scores:
    """What the reader sees in the generated pictures; shares between 0 and 1."""

    look_when_asked_base: float
    look_when_asked_adapter: float
    look_unasked_adapter: float
    words_base: float  # shape, colour and background as the caption says
    words_adapter: float


def main(argv: Sequence[str]) -> int:
    """Run the demo; returns 0 when the adapter learned the look and the known words stayed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=DEMOS, default="sdxl")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--pictures", type=int, default=32, help="generated pictures of each kind that are scored")
    options = parser.parse_args(argv)
    started = time.monotonic()
    demo, folder = DEMOS[options.family], options.output
    taught = make_dataset(folder / "dataset", seed=7)
    train(demo, folder)
    pictures = [random_picture(np.random.default_rng((11, index))) for index in range(options.pictures)]
    drawn = {kind: generate(demo, folder, kind, pictures) for kind in KINDS}
    scores = score(pictures, drawn)
    picture = folder / "demo.png"
    contact_sheet(taught, drawn, picture)
    report(scores, picture, folder, time.monotonic() - started)
    show(picture)
    return 0 if scores.look_when_asked_adapter >= 0.8 and scores.words_adapter >= 0.8 * scores.words_base else 1


@dataclass(kw_only=True, frozen=True)
class Kind:
    """One set of generated pictures."""

    title: str
    asks: bool  # is the new word in the prompt?
    strength: float | None  # of the adapter; None is the base model alone


KINDS = {
    "asked without": Kind(title="asked, without the adapter", asks=True, strength=None),
    "asked at 0.5": Kind(title="asked, adapter at 0.5", asks=True, strength=0.5),
    "asked at 1.0": Kind(title="asked, adapter at 1.0", asks=True, strength=1.0),
    "unasked without": Kind(title="not asked, without the adapter", asks=False, strength=None),
    "unasked at 1.0": Kind(title="not asked, adapter at 1.0", asks=False, strength=1.0),
}


def make_dataset(folder: Path, seed: int) -> list[Image.Image]:
    """Draw the training pictures with their captions and write the dataset file; returns the pictures of the new look."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.txt")):
        old.unlink()
    images = []
    for index, picture in enumerate(taught_pictures()):
        image = draw(picture, seed=seed * 1000 + index)
        image.save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(caption(picture) + "\n", encoding="utf-8")
        images += [image] if index < TAUGHT else []
    lines = ["[general]", "resolution = 64", 'caption_extension = ".txt"', "", "[[datasets]]", "batch_size = 8", ""]
    lines += ["[[datasets.subsets]]", f"image_dir = {json.dumps(str(folder.resolve()))}"]
    (folder / "dataset.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return images


def taught_pictures() -> list[Picture]:
    """The training pictures: the new look on every shape and colour, then ordinary ones."""
    shapes, colours, backgrounds = list(SHAPES), list(COLOURS), list(BACKGROUNDS)
    textures = ("plain", "striped", "plain", "dotted")
    pictures = [
        Picture(shape=shapes[n % 5], colour=colours[n % 7], texture=textures[n % 4], background=backgrounds[n % 6])
        for n in range(TAUGHT + ORDINARY)
    ]
    return [with_new_look(picture) if n < TAUGHT else picture for n, picture in enumerate(pictures)]


def train(demo: Demo, folder: Path) -> None:
    """Run the training script as a user would."""
    output = ("--dataset_config", f"{folder}/dataset/dataset.toml", "--output_dir", str(folder), "--output_name", "look")
    launch = (
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    call(*launch, "--num_cpu_threads_per_process", "1", *demo.train, *output)


def generate(demo: Demo, folder: Path, name: str, pictures: Sequence[Picture]) -> list[Image.Image]:
    """Draw every picture once with the generation script; the same seeds for every kind."""
    kind = KINDS[name]
    target = folder / name.replace(" ", "_")
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    prompts = folder / f"{target.name}.txt"
    asked = [with_new_look(picture) if kind.asks else picture for picture in pictures]
    lines = [f"{caption(picture)} --d {1000 + index}" for index, picture in enumerate(asked)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    adapter = () if kind.strength is None else demo.adapter(str(folder / "look.safetensors"), kind.strength)
    call(*demo.generate, "--from_file", str(prompts), *demo.into, str(target), *adapter)
    drawn = sorted(target.glob("*.png"), key=lambda path: int(path.stem.rpartition("_")[2]))  # by number, or by seed
    return [Image.open(path).convert("RGB") for path in drawn]


def score(pictures: Sequence[Picture], drawn: dict[str, list[Image.Image]]) -> Scores:
    """Read every generated picture."""
    return Scores(
        look_when_asked_base=_share(has_new_look(image) for image in drawn["asked without"]),
        look_when_asked_adapter=_share(has_new_look(image) for image in drawn["asked at 1.0"]),
        look_unasked_adapter=_share(has_new_look(image) for image in drawn["unasked at 1.0"]),
        words_base=_share(_agrees(image, picture) for image, picture in zip(drawn["unasked without"], pictures, strict=True)),
        words_adapter=_share(_agrees(image, picture) for image, picture in zip(drawn["unasked at 1.0"], pictures, strict=True)),
    )


def contact_sheet(taught: Sequence[Image.Image], drawn: dict[str, list[Image.Image]], path: Path) -> None:
    """One picture: a row of the dataset, then a row for each kind that asks for the look."""
    rows = [("dataset", list(taught))] + [(KINDS[name].title, drawn[name]) for name in KINDS if KINDS[name].asks]
    height = CELL + 18 + MARGIN
    sheet = Image.new("RGB", (COLUMNS * (CELL + MARGIN) + MARGIN, len(rows) * height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, images) in enumerate(rows):
        pen.text((MARGIN, row * height + MARGIN), title, fill="black")
        for column, image in enumerate(images[:COLUMNS]):
            place = (MARGIN + column * (CELL + MARGIN), row * height + MARGIN + 16)
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.NEAREST), place)
    sheet.save(path)


def report(scores: Scores, picture: Path, folder: Path, seconds: float) -> None:
    """Print the scores and keep them beside the picture."""
    (folder / "scores.json").write_text(json.dumps({**vars(scores), "seconds": round(seconds, 1)}, indent=2) + "\n", encoding="utf-8")
    print(f"\npictures that show the look '{NEW_LOOK_WORD}' when asked: {scores.look_when_asked_base:.0%} without the adapter,", end=" ")
    print(f"{scores.look_when_asked_adapter:.0%} with it ({scores.look_unasked_adapter:.0%} when not asked)")
    print(f"pictures that show what a known caption says: {scores.words_base:.0%} without the adapter, {scores.words_adapter:.0%} with it")
    print(f"{seconds:.0f} s; the picture: {picture}")


def show(picture: Path) -> None:
    """Open the picture in the system's viewer, where a person sits in front of one."""
    if sys.stdout.isatty() and (sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        Image.open(picture).show()


def call(*arguments: str) -> None:
    """Run Python with arguments in the project folder, showing the command; stop where it fails."""
    print("\n$ python", " ".join(arguments), flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    status = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
    if status != 0:
        sys.exit(status)


def _agrees(image: Image.Image, picture: Picture) -> bool:
    reading = read(image)
    return (reading.shape, reading.colour, reading.background) == (picture.shape, picture.colour, picture.background)


def _share(answers: Iterable[bool]) -> float:
    values = list(answers)
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
