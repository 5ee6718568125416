"""The inspection of a run's data: everything that is worth knowing before the first step, as one report."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from library.data.dataset import TrainingData
from library.data.idle import idle_keys
from library.data.inspection.conflicts import conflict_findings
from library.data.inspection.copies import duplicate_findings, sources_of
from library.data.inspection.costs import ModelFacts, Texts, cache_facts, cut_captions, length_findings, time_facts
from library.data.inspection.counts import Part, count_findings, dataset_facts, parts_of
from library.data.inspection.findings import LEVELS, CacheFacts, DatasetFacts, Finding, Report, finding
from library.data.inspection.folders import folder_findings
from library.data.inspection.looking import look_at, mask_problems
from library.data.inspection.wording import caption_facts, caption_findings


def survey(
    data: TrainingData, models: Sequence[ModelFacts], *, found: Iterable[Finding] = (), run: Mapping[str, int] | None = None
) -> Report:
    """Inspect the data of a run: every image and mask is decoded, nothing is written.

    `models` are those whose caches and lengths of captions are told, `found` is what was found before, and `run` holds further numbers
    for the report (`steps_per_epoch`, `steps`, `processes`).
    """
    parts = [(part, dataset_facts(part)) for part in parts_of(data)]
    captions = caption_facts(data.images)
    sources = sources_of(data)
    looks = look_at(sources)
    broken = [finding("error", "images", problem) for problem in (*looks.problems.values(), *mask_problems(data))]
    caches, lengths = _for_models(data, models)
    findings = [
        *found,
        *broken,
        *_of_parts(data, parts),
        *duplicate_findings(looks, sources),
        *caption_findings(data.images, captions),
        *lengths,
        *folder_findings(data),
    ]
    return Report(
        findings=tuple(sorted(findings, key=lambda each: LEVELS.index(each.level))),
        datasets=tuple(facts for _, facts in parts),
        captions=captions,
        caches=tuple(caches),
        time=None if broken else time_facts(data),
        run=dict(run or {}),
    )


def _of_parts(data: TrainingData, parts: Iterable[tuple[Part, DatasetFacts]]) -> Iterator[Finding]:
    yield from (finding("warning", "options", text) for text in dict.fromkeys(idle_keys(data.datasets, data.options)))
    for part, facts in parts:
        yield from count_findings(part, facts)
        yield from conflict_findings(part)


def _for_models(data: TrainingData, models: Iterable[ModelFacts]) -> tuple[list[CacheFacts], list[Finding]]:
    texts = Texts(data.images)
    caches: list[CacheFacts] = []
    findings: list[Finding] = []
    for model in models:
        cut = cut_captions(texts, model)
        findings += length_findings(texts, model, cut or ())
        caches.append(cache_facts(data, model, None if cut is None else len(cut)))
    return caches, findings
