"""Draw pictures with Anima and adapters: `python anima_minimal_inference.py --help`."""

from library.core.command_line import run_script
from library.inference.minimal.script import main

if __name__ == "__main__":
    run_script(lambda argv: main("anima", argv))
