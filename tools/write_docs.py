"""Write `docs/options.md` and the tables of other pages from the declared options: `python -m tools.write_docs`."""

from pathlib import Path

from library.core.atomic import write_text
from library.core.command_line import CONFIG_HELP, OUTPUT_HELP, PRESET_HELP, markdown_table
from library.core.options import declared, describe
from library.data.options import key_table
from library.inference import script
from library.inference.minimal import script as minimal_script
from library.models.architecture import architecture_named, architecture_names
from library.models.presets import presets
from library.training.retired import refused_options
from library.training.run import option_groups
from networks.lokr import LoKrArguments
from networks.selection import NetworkArguments
from tools.convert_adapter import ConvertOptions
from tools.extract_adapter import ExtractOptions
from tools.inspect_adapter import InspectOptions
from tools.lint_dataset import LintOptions
from tools.merge_adapters import MergeOptions
from tools.resize_adapter import ResizeOptions

DOCS = Path(__file__).parent.parent / "docs"
TOOLS = {
    "inspect_adapter": InspectOptions,
    "convert_adapter": ConvertOptions,
    "merge_adapters": MergeOptions,
    "resize_adapter": ResizeOptions,
    "extract_adapter": ExtractOptions,
    "lint_dataset": LintOptions,
}


def options_page() -> str:
    """The whole page as Markdown."""
    return "\n".join(
        [
            "# Options",
            "",
            "Made by `python -m tools.write_docs` from the declarations; do not edit. Flags can be switched off with `--no-<flag>`.",
            f"`--config_file`: {CONFIG_HELP}. `--output_config`: {OUTPUT_HELP}.",
            f"`--preset` (training scripts): {PRESET_HELP.format(', '.join(presets(architecture_named('sdxl'))))}.",
            "",
            "## All training scripts",
            "",
            markdown_table(shared_groups()),
            *(f"## {name}_train_network.py alone\n\n{markdown_table(own_groups(name))}" for name in architecture_names()),
            f"## gen_img.py\n\n{markdown_table(script.option_groups(architecture_named('sdxl')))}",
            f"## anima_minimal_inference.py\n\n{markdown_table(minimal_script.option_groups(architecture_named('anima')))}",
            *(f"## python -m tools.{name}\n\n{markdown_table([group])}" for name, group in TOOLS.items()),
            f"## Options of sd-scripts that the training scripts refuse\n\n{refused_table()}",
        ]
    )


def refused_table() -> str:
    """Every option that is refused with a reason of its own, as Markdown: the scripts that refuse it, and what they say."""
    families = architecture_names()
    refused = {name: refused_options(architecture_named(name)) for name in families}
    rows = [
        f"| `--{option}` | {', '.join(name for name in families if refused[name].get(option) == reason)} | {reason} |"
        for option in sorted({option for table in refused.values() for option in table})
        for reason in dict.fromkeys(table[option] for table in refused.values() if option in table)
    ]
    return "\n".join(["| option | refused for | because |", "| --- | --- | --- |", *rows]) + "\n"


def shared_groups() -> list[type]:
    """The option groups that the training scripts of all families have, in the order of their help."""
    every = [option_groups(architecture_named(name)) for name in architecture_names()]
    return [group for group in every[0] if all(group in groups for groups in every)]


def own_groups(family: str) -> list[type]:
    """The option groups of one family's training script that another has not."""
    return [group for group in option_groups(architecture_named(family)) if group not in shared_groups()]


def adapters_page() -> str:
    """docs/adapters.md with its table of network arguments made anew; what stands around the table is kept."""
    rows = [f"| `{entry.name}` | {describe(entry.kind).replace('|', ' or ')} | {entry.help} |" for entry in declared(NetworkArguments)]
    common = {entry.name for entry in declared(NetworkArguments)}
    rows += [
        f"| `{entry.name}` (LoKr) | {describe(entry.kind)} | {entry.help} |"
        for entry in declared(LoKrArguments)
        if entry.name not in common
    ]
    return _with_table("adapters.md", "| argument | type | meaning |\n| --- | --- | --- |\n", "\n".join(rows))


def dataset_page() -> str:
    """docs/dataset.md with its table of keys made anew."""
    head, rows = key_table().strip().split("\n", 2)[:2], key_table().strip().split("\n", 2)[2]
    return _with_table("dataset.md", "\n".join(head) + "\n", rows)


def _with_table(name: str, head: str, rows: str) -> str:
    """A page in which the rows under `head` are replaced, up to the next empty line."""
    before, found, rest = (DOCS / name).read_text(encoding="utf-8").partition(head)
    assert found, f"{name} has lost its table"
    return before + head + rows + rest[rest.index("\n\n") :]


PAGES = {"options.md": options_page, "adapters.md": adapters_page, "dataset.md": dataset_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        write_text(DOCS / name, page())
        print(f"wrote {name}")
