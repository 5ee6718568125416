"""Train a LoRA, LoHa or LoKr for SDXL: `accelerate launch sdxl_train_network.py --help`."""

from library.core.command_line import run_script
from library.training.run import main

if __name__ == "__main__":
    run_script(lambda argv: main("sdxl", argv))
