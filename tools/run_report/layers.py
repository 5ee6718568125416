"""How far each layer has moved: the norms of the deltas in every saved file, as a heat map over the steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

from library.core.tensor_file import read_header
from library.training.optimizing.average import AVERAGED
from networks.open_file import open_adapter
from tools.run_report.charts import number_text
from tools.run_report.pictures import spread_over

MOST_FILES = 12
FEW_ROWS = 40  # more layers than that are told by their blocks first
ROW, CELL, BAR = 17, 34, 150  # sizes in the picture
LETTER, LONGEST = 6.2, 46  # width of a letter, and the most letters of a name


@dataclass(frozen=True)
class Change:
    """How much a layer, or several together, have changed: the norm of the deltas and how many weights they are of."""

    squares: float
    weights: int

    @property
    def rms(self) -> float:
        """The root of the mean square of a weight's change."""
        return math.sqrt(self.squares / self.weights)

    def __add__(self, other: "Change") -> "Change":
        return Change(self.squares + other.squares, self.weights + other.weights)


@dataclass(frozen=True, kw_only=True)
class SavedNorms:
    """The changes that one saved file makes, by part and canonical path; the blocks are those of each path."""

    title: str
    step: int
    layers: dict[tuple[str, str], Change]
    blocks: dict[tuple[str, str], tuple[str, str]]


def norms_html(files: Sequence[Path], *, family: str | None, base: Path | None) -> str:
    """The heat maps of a run's files: by block, and by layer; sentences for what cannot be read."""
    if not files:
        return '<p class="none">No saved file yet.</p>'
    dated = sorted((_step_of(path), path) for path in files)
    shown = spread_over(dated, MOST_FILES)
    problems: list[str] = []
    if len(shown) < len(dated):
        problems.append(f"{len(dated) - len(shown)} of {len(dated)} saved files are not shown")
    found: list[SavedNorms] = []
    for step, path in shown:
        try:
            found.append(saved_norms(path, step, family=family, base=base))
        except ValueError as error:
            problems.append(f"{path.name}: {str(error).splitlines()[0]}")
    told = "".join(f'<p class="none">{escape(problem)}</p>' for problem in problems)
    return told + (_maps(found) if found else "")


@torch.no_grad()
def saved_norms(path: Path, step: int, *, family: str | None, base: Path | None) -> SavedNorms:
    """The changes that a file makes. Raises `ValueError` for one that is not read."""
    network = open_adapter(path, family=family, base=base)
    places = [((member.part.name, member.target.path), member) for member in network.members]
    return SavedNorms(
        title=path.stem,
        step=step,
        layers={place: Change(float(member.adapter.delta_norm()) ** 2, math.prod(member.adapter.shape.weight)) for place, member in places},
        blocks={place: (member.part.name, member.target.container) for place, member in places},
    )


def heat_map(columns: Sequence[tuple[str, str]], rows: Sequence[tuple[str, Sequence[Change | None]]]) -> str:
    """An SVG: a row for each name, a cell for each column, and a bar for the last one. Columns are (label, full name)."""
    values = [change.rms for _, cells in rows for change in cells if change is not None]
    most = max(values, default=0.0) or 1.0
    label = 12 + LETTER * max((min(len(name), LONGEST) for name, _ in rows), default=0)
    width, height = label + CELL * len(columns) + BAR, ROW * len(rows) + 30
    parts = [
        f'<text class="x" x="{label + CELL * (n + 0.5):.1f}" y="16">{escape(step)}<title>{escape(full)}</title></text>'
        for n, (step, full) in enumerate(columns)
    ]
    for index, (name, cells) in enumerate(rows):
        top = 24 + ROW * index
        parts.append(f'<text class="y" x="{label - 8:.1f}" y="{top + 12}">{escape(_short(name))}<title>{escape(name)}</title></text>')
        parts += _cells(name, cells, columns, (label, top), most)
    return f'<svg class="heat" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img" aria-label="norms">{"".join(parts)}</svg>'


def _cells(
    name: str, cells: Sequence[Change | None], columns: Sequence[tuple[str, str]], corner: tuple[float, int], most: float
) -> Iterator[str]:
    left, top = corner
    for n, (change, (_, full)) in enumerate(zip(cells, columns, strict=True)):
        if change is not None:
            title = escape(f"{name}, {full}: rms {change.rms:.2e}, norm {math.sqrt(change.squares):.3g}")
            shade = 0.04 + 0.96 * change.rms / most
            yield (
                f'<rect class="h" x="{left + CELL * n:.1f}" y="{top}" width="{CELL - 1}" height="{ROW - 1}" fill-opacity="{shade:.2f}">'
                f"<title>{title}</title></rect>"
            )
    last = cells[-1]
    if last is not None:
        bar = left + CELL * len(columns) + 8
        yield f'<rect class="b" x="{bar:.1f}" y="{top + 3}" width="{max(1.0, 80 * last.rms / most):.1f}" height="{ROW - 7}"/>'
        yield f'<text class="v" x="{bar + 84:.1f}" y="{top + 12}">{number_text(last.rms)}</text>'


def _maps(found: Sequence[SavedNorms]) -> str:
    layers = list(dict.fromkeys(place for norms in found for place in norms.layers))
    shown = "".join(
        _of_part(part, [place for place in layers if place[0] == part], found) for part in dict.fromkeys(part for part, _ in layers)
    )
    about = (
        "Shown is the root mean square of the change of a layer's weights: the stronger the colour, the further. The bar is the last file."
    )
    if any(norms.title.endswith(AVERAGED) for norms in found):
        about += " A star marks averaged weights."
    return f'<p>{about}</p><div class="maps">{shown}</div>'


def _of_part(part: str, places: Sequence[tuple[str, str]], found: Sequence[SavedNorms]) -> str:
    """The map of a part's layers; of many, that of their blocks, and of the layers folded."""
    columns = [(_label(norms), f"{norms.title} (step {norms.step})") for norms in found]
    title = f"<h3>{escape(part)} <small>{len(places)} layers; columns are the steps of saved files</small></h3>"
    by_layer = heat_map(columns, [(path, [norms.layers.get((part, path)) for norms in found]) for _, path in places])
    by_layer = f'<div class="wide">{by_layer}</div>'
    if len(places) <= FEW_ROWS:
        return f"<div>{title}{by_layer}</div>"
    blocks = {place: block for norms in found for place, block in norms.blocks.items()}
    names = list(dict.fromkeys(blocks[place] for place in places))
    by_block = heat_map(columns, [(name, [_together(norms, (part, name)) for norms in found]) for _, name in names])
    return f'<div>{title}<div class="wide">{by_block}</div><details><summary>Every layer</summary>{by_layer}</details></div>'


def _label(norms: SavedNorms) -> str:
    """The step of a file, of averaged weights with a star; the end of its name where it tells no step."""
    label = f"{norms.step:,}" if norms.step else norms.title.removesuffix(AVERAGED)[-5:]
    return f"{label}*" if norms.title.endswith(AVERAGED) else label


def _together(norms: SavedNorms, block: tuple[str, str]) -> Change | None:
    own = [change for place, change in norms.layers.items() if norms.blocks[place] == block]
    return sum(own[1:], own[0]) if own else None


def _step_of(path: Path) -> int:
    """The step that a file's metadata names; 0 where it names none."""
    try:
        text = read_header(path).metadata.get("ss_steps", "")
    except ValueError:
        return 0
    return int(text) if text.isdigit() else 0


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[:12]}...{name[15 - LONGEST :]}"
