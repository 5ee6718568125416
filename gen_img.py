"""Draw pictures with SDXL and adapters: `python gen_img.py --help`."""

from library.core.command_line import run_script
from library.inference.script import main

if __name__ == "__main__":
    run_script(lambda argv: main("sdxl", argv))
