"""Encode the images of a dataset before training: `python -m tools.cache_latents --family sdxl <the training options>`.

Several processes share the work: `accelerate launch --num_processes 2 -m tools.cache_latents ...`. A training run with
`--cache_latents_to_disk` and the same options then finds everything.
"""

from library.core.command_line import run_script
from library.training.cache_script import main

if __name__ == "__main__":
    run_script(lambda argv: main("latents", argv))
