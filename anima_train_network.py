"""Train a LoRA, LoHa or LoKr for Anima: `accelerate launch anima_train_network.py --help`."""

from library.core.command_line import run_script
from library.training.run import main

if __name__ == "__main__":
    run_script(lambda argv: main("anima", argv))
