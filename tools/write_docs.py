"""Write `docs/options.md` from the declared options: `python -m tools.write_docs`."""

from pathlib import Path

from library.core.atomic import write_text
from library.core.command_line import CONFIG_HELP, markdown_table
from library.inference.script import GROUPS as GENERATION_GROUPS
from library.models.architecture import architecture_named
from library.training.run import option_groups

PAGE = Path(__file__).parent.parent / "docs" / "options.md"


def options_page() -> str:
    """The whole page as Markdown."""
    return "\n".join(
        [
            "# Options",
            "",
            "Made by `python -m tools.write_docs` from the declarations; do not edit. Flags can be switched off with `--no-<flag>`.",
            f"`--config_file`: {CONFIG_HELP}.",
            "",
            "## sdxl_train_network.py",
            "",
            markdown_table(option_groups(architecture_named("sdxl"))),
            "## gen_img.py",
            "",
            markdown_table(GENERATION_GROUPS),
        ]
    )


if __name__ == "__main__":
    write_text(PAGE, options_page())
    print(f"wrote {PAGE.name}")
