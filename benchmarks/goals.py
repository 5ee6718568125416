"""The goals of docs/performance.md, each with the figures that decide it: met, missed, or not measured here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.peers import OURS, PACKAGES, SD_SCRIPTS
from benchmarks.results import FROZEN, Row, Rows, markdown, ratio
from benchmarks.shapes import HOST_COST, LOHA_4, LOHA_8, LOHA_32, LOKR_8, LOKR_EVEN, LOKR_FULL, LORA_16

LORA, LOHA_SMALL = LORA_16.title, (LOHA_4.title, LOHA_8.title)
LOKR = (LOKR_8.title, LOKR_FULL.title, LOKR_EVEN.title)
MANY = 1024  # tokens from which a layer's cost is that of its products


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure and where it was measured."""

    where: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A claim: every figure lies between `least` and `most`."""

    text: str
    most: float
    least: float = 0.0
    figures: Callable[[Any], Iterable[Figure]]  # of what its benchmark has measured: `Rows`, or `life`'s own

    def admits(self, figure: Figure) -> bool:
        """Whether a figure meets the goal."""
        return self.least <= figure.value <= self.most

    @property
    def bounds(self) -> str:
        """The limits as a table shows them."""
        return f"{self.least:g} to {self.most:g}" if self.least else f"<= {self.most:g}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal with all its figures."""

    goal: Goal
    figures: list[Figure]

    @property
    def word(self) -> str:
        """met, missed, or not measured."""
        if not self.figures:
            return "not measured"
        return "met" if all(map(self.goal.admits, self.figures)) else "missed"

    @property
    def worst(self) -> Figure:
        """The figure farthest outside the bounds, or nearest to them."""
        middle = self.goal.least and (self.goal.least + self.goal.most) / 2
        return max(self.figures, key=lambda figure: abs(figure.value - middle))


def judged(listed: Iterable[Goal], measured: Any) -> list[Verdict]:
    """Each goal with the figures that its benchmark's measurements have for it."""
    return [Verdict(goal=goal, figures=list(goal.figures(measured))) for goal in listed]


def table(verdicts: Iterable[Verdict]) -> str:
    """A Markdown table: the goal, how many figures meet it, their median and the worst with its place."""
    body = []
    for verdict in verdicts:
        figures, goal = verdict.figures, verdict.goal
        entries = ["", "", "", ""]
        if figures:
            met = sum(map(goal.admits, figures))
            entries = [
                f"{met} of {len(figures)}",
                f"{median(figure.value for figure in figures):.3g}",
                f"{verdict.worst.value:.3g}",
                verdict.worst.where,
            ]
        body.append([goal.text, goal.bounds, verdict.word, *entries])
    return markdown(["goal", "bound", "", "figures within", "median", "worst", "where"], body)


# Figures of layers


def against(
    settings: tuple[str, ...], other: tuple[str, str], *, positions: int = 0, precision: str = ""
) -> Callable[[Rows], Iterator[Figure]]:
    """Our time in these settings over that of the `other` setting ("" for the same one) and way; of cases with so many positions."""

    def figures(rows: Rows) -> Iterator[Figure]:
        for row in _ours(rows, settings):
            setting, way = other
            rival = rows.beside(row, setting or row.setting, way)
            is_wanted = row.positions >= positions and row.precision.startswith(precision)
            if rival is not None and is_wanted and _is_timed(row):
                yield Figure(where=_where(row), value=ratio(row, rival))

    return figures


def against_best_package(rows: Rows) -> Iterator[Figure]:
    """Our time over the least of LyCORIS' two modes and PEFT, in every case and setting: the layer that shows the host's cost too."""
    for row in (row for row in rows if row.way == OURS):
        rivals = [rival for way in PACKAGES if (rival := rows.beside(row, row.setting, way)) is not None]
        if rivals and _is_timed(row):
            yield Figure(where=_where(row), value=max(ratio(row, rival) for rival in rivals))


def kept_over_lora(rows: Rows) -> Iterator[Figure]:
    """Bytes kept beyond the frozen layer's, over our LoRA's."""
    for row in _ours(rows):
        lora, frozen = rows.beside(row, LORA, OURS), rows.beside(row, "", FROZEN)
        if row.setting != LORA and not row.setting.startswith("LoRA") and lora is not None and frozen is not None:
            yield Figure(where=_where(row), value=(row.kept_bytes - frozen.kept_bytes) / (lora.kept_bytes - frozen.kept_bytes))


def kernels(*beginnings: str) -> Callable[[Rows], Iterator[Figure]]:
    """Kernels beyond the frozen layer's, of our algorithms whose titles begin so."""

    def figures(rows: Rows) -> Iterator[Figure]:
        for row in _ours(rows):
            frozen = rows.beside(row, "", FROZEN)
            if frozen is not None and row.setting.startswith(beginnings) and not row.is_emulated:
                yield Figure(where=_where(row), value=row.kernels - frozen.kernels)

    return figures


def host_cost(rows: Rows) -> Iterator[Figure]:
    """Our LoRA's time on a layer whose products cost nothing, over that of a plain swap of its forward, as sd-scripts has it."""
    for row in rows:
        rival = rows.beside(row, LORA, SD_SCRIPTS)
        if row.case == HOST_COST.title and (row.setting, row.way) == (LORA, OURS) and rival is not None and _is_timed(row):
            yield Figure(where=_where(row), value=ratio(row, rival))


def host_exchanges(rows: Rows) -> Iterator[Figure]:
    """Exchanges with the host beyond the frozen layer's."""
    for row in _ours(rows):
        frozen = rows.beside(row, "", FROZEN)
        if frozen is not None:
            yield Figure(where=_where(row), value=row.host_exchanges - frozen.host_exchanges)


def facts(beginning: str) -> Callable[[Rows], Iterator[Figure]]:
    """Facts of our rows in half precision whose names begin so."""

    def figures(rows: Rows) -> Iterator[Figure]:
        for row in _ours(rows):
            if row.precision != "float32":
                yield from (
                    Figure(where=f"{_where(row)}, {name}", value=value) for name, value in row.facts.items() if name.startswith(beginning)
                )

    return figures


def _ours(rows: Rows, settings: tuple[str, ...] = ()) -> Iterator[Row]:
    return (row for row in rows if row.way == OURS and row.case != HOST_COST.title and (not settings or row.setting in settings))


def _is_timed(row: Row) -> bool:
    return bool(row.seconds) and not row.is_emulated


def _where(row: Row) -> str:
    return f"{row.setting}, {row.case}, {row.precision}"


LAYER_GOALS = (
    Goal(
        text="LoKr (f=8 r=16, f=8 full, f=-1) over our LoRA r=16, 1024 tokens and more",
        most=1.10,
        figures=against(LOKR, (LORA, OURS), positions=MANY),
    ),
    Goal(text="LoHa r <= 8 over our LoRA r=16, 1024 tokens and more", most=1.10, figures=against(LOHA_SMALL, (LORA, OURS), positions=MANY)),
    Goal(
        text="LoHa r=32 over sd-scripts' way, float32", most=0.66, figures=against((LOHA_32.title,), ("", SD_SCRIPTS), precision="float32")
    ),
    Goal(
        text="LoHa r=32 over sd-scripts' way, bfloat16 with one rounding",
        most=0.75,
        figures=against((LOHA_32.title,), ("", SD_SCRIPTS), precision="b"),
    ),
    Goal(text="LoKr over sd-scripts' way", most=0.45, figures=against(LOKR, ("", SD_SCRIPTS))),
    Goal(text="ours over the best of LyCORIS (both modes) and PEFT, everywhere", most=1.00, figures=against_best_package),
    Goal(text="LoHa r=4 over sd-scripts' LoHa", most=0.40, figures=against((LOHA_4.title,), ("", SD_SCRIPTS))),
    Goal(text="LoHa r=4 over sd-scripts' LoRA r=16", most=1.00, figures=against((LOHA_4.title,), (LORA, SD_SCRIPTS))),
    Goal(text="kept for backward beyond the frozen layer's, LoHa and LoKr over our LoRA r=16", most=1.10, figures=kept_over_lora),
    Goal(text="kernels beyond the frozen layer's, LoRA", most=10, figures=kernels("LoRA")),
    Goal(text="kernels beyond the frozen layer's, LoHa and LoKr", most=20, figures=kernels("LoHa", "LoKr")),
    Goal(text="host cost of LoRA over that of a plain swap of forward", most=1.00, figures=host_cost),
    Goal(text="exchanges with the host", most=0, figures=host_exchanges),
    Goal(text="the delta alone against float64, half precision", most=0.005, figures=facts("output error")),
    Goal(text="share of a small delta that the output shows, half precision", least=0.99, most=1.01, figures=facts("seen")),
)

# Figures of whole steps


def step_over(settings: tuple[str, ...], other: tuple[str, str]) -> Callable[[Rows], Iterator[Figure]]:
    """Our step's time in these settings over that of another setting and way, on a GPU."""

    def figures(rows: Rows) -> Iterator[Figure]:
        for row in _on_gpu(rows, settings):
            rival = rows.beside(row, *other)
            if rival is not None:
                yield Figure(where=_where(row), value=ratio(row, rival))

    return figures


def kernels_a_layer(*beginnings: str) -> Callable[[Rows], Iterator[Figure]]:
    """Kernels beyond the frozen model's for each adapted layer, on a GPU."""

    def figures(rows: Rows) -> Iterator[Figure]:
        for row in _on_gpu(rows):
            frozen = rows.beside(row, "", FROZEN)
            if frozen is not None and row.setting.startswith(beginnings):
                yield Figure(where=_where(row), value=(row.kernels - frozen.kernels) / row.facts["layers"])

    return figures


def step_synchronisations(rows: Rows) -> Iterator[Figure]:
    """Synchronisations of host and device beyond the frozen model's."""
    for row in _on_gpu(rows):
        frozen = rows.beside(row, "", FROZEN)
        if frozen is not None:
            yield Figure(where=_where(row), value=row.host_exchanges - frozen.host_exchanges)


def _on_gpu(rows: Rows, settings: tuple[str, ...] = ()) -> Iterator[Row]:
    return (row for row in _ours(rows, settings) if row.facts.get("gpu"))


STEP_GOALS = (
    Goal(text="whole step on a GPU: LoKr over our LoRA", most=1.05, figures=step_over(LOKR, (LORA, OURS))),
    Goal(text="whole step on a GPU: LoHa r=8 over our LoRA", most=1.10, figures=step_over((LOHA_8.title,), (LORA, OURS))),
    Goal(text="whole step on a GPU: LoRA over the frozen model", most=1.20, figures=step_over((LORA,), ("", FROZEN))),
    Goal(text="kernels for each adapted layer on a GPU, LoRA", most=10, figures=kernels_a_layer("LoRA")),
    Goal(text="kernels for each adapted layer on a GPU, LoHa and LoKr", most=20, figures=kernels_a_layer("LoHa", "LoKr")),
    Goal(text="synchronisations of host and device", most=0, figures=step_synchronisations),
)
