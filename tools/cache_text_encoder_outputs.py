"""Encode the captions of a dataset before training: `python -m tools.cache_text_encoder_outputs --family sdxl <the training options>`.

Several processes share the work, as with `tools.cache_latents`. A training run with `--cache_text_encoder_outputs_to_disk`,
`--network_train_unet_only` and the same options then finds everything.
"""

from library.core.command_line import run_script
from library.training.cache_script import main

if __name__ == "__main__":
    run_script(lambda argv: main("text", argv))
