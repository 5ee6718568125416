"""A report as one page: numbers, findings and contact sheets, in a file of its own that needs nothing else and runs no script."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from library.data.inspection.contact_sheet import Sheet, Shot
from library.data.inspection.findings import LEVELS, CaptionFacts, DatasetFacts, Report, Section
from library.data.inspection.page_style import STYLE
from library.data.inspection.report_text import CACHE_HEADER, cache_row, counted, size_name, time_sentence, totals

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the page cannot load anything, whatever a caption holds
SHORT = 80  # letters of a caption under its picture; the rest unfolds


def report_html(report: Report, sheets: Iterable[Sheet], title: str = "dataset") -> str:
    """The whole page. All text of the data is escaped."""
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>',
            f"<h1>{escape(title)}</h1><p>{escape(totals(report))}</p>",
            *_findings(report),
            *(line for facts in report.datasets for line in _dataset(facts)),
            *([*_captions(report.captions)] if report.captions is not None else []),
            *_costs(report),
            *(line for section in report.sections for line in _section(section)),
            *(line for sheet in sheets for line in _sheet(sheet)),
            "</main></body></html>",
            "",
        ]
    )


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are escaped; cells that begin with a digit or a sign are numbers."""
    return _table(header, "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows))


def _table(header: Sequence[str], body: str) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    kind = ' class="number"' if text[:1].isdigit() else ""
    return f"<td{kind}>{escape(text)}</td>"


# Blocks


def _findings(report: Report) -> Iterator[str]:
    for level in LEVELS:
        own = report.of_level(level)
        if own:
            yield f'<section class="{level}"><h2>{counted(len(own), level)}</h2><ul>'
            for each in own:
                details = "".join(f"<li>{escape(detail)}</li>" for detail in each.details)
                inner = f"<details><summary>{escape(each.text)}</summary><ul>{details}</ul></details>" if details else escape(each.text)
                yield f"<li>{inner}</li>"
            yield "</ul></section>"


def _dataset(facts: DatasetFacts) -> Iterator[str]:
    role = " (validation)" if facts.role == "validation" else ""
    yield f"<section><h2>Dataset {facts.number}{role}</h2>"
    batches = f"{facts.batches} batches an epoch, {facts.partial} of them not full"
    changes = f"{facts.lost:.1%} of the pixels are lost by cropping, {facts.enlarged} images are enlarged"
    about = f"{size_name(facts.resolution)}, batch size {facts.batch_size}: {facts.images} images, {facts.uses} uses"
    yield f"<p>{about}, {batches}; {changes}.</p>"
    folders = (
        [each.name, str(each.images), str(each.repeats), str(each.uses), "regularisation" if each.is_reg else ""] for each in facts.folders
    )
    yield html_table(["folder", "images", "repeats", "uses", ""], folders)
    yield _bucket_table(facts)
    if facts.worst_crops:
        rows = ([name, f"{share:.1%}"] for name, share in facts.worst_crops)
        yield _folded("Images that lose most", html_table(["image", "lost"], rows))
    if facts.most_enlarged:
        rows = ([name, f"{factor:.2f} times"] for name, factor in facts.most_enlarged)
        yield _folded("Images that are enlarged most", html_table(["image", "enlarged"], rows))
    yield "</section>"


def _bucket_table(facts: DatasetFacts) -> str:
    """The buckets with a bar for the uses of each, and a link to its pictures."""
    most = max(each.uses for each in facts.buckets)
    rows = []
    for each in facts.buckets:
        link = f'<a href="#{_anchor(facts.role, facts.number, each.size)}">{size_name(each.size)}</a>'
        numbers = (str(each.images), str(each.uses), str(each.batches), str(each.last_batch), f"{each.lost:.1%}")
        bar = f'<td class="bar"><span style="width:{each.uses / most:.1%}"></span></td>'
        rows.append(f"<tr><td>{link}</td>{''.join(map(_cell, numbers))}{bar}</tr>")
    return _table(("bucket", "images", "uses", "batches", "last batch", "pixels lost", ""), "".join(rows))


def _captions(facts: CaptionFacts) -> Iterator[str]:
    yield "<section><h2>Captions</h2>"
    yield f"<p>{facts.images} images, {facts.distinct} different captions, {facts.empty} empty, up to {facts.longest_words} words.</p>"
    if facts.are_tags:
        yield f"<p>{facts.tags} different tags, {facts.once} of them in one caption only.</p>"
        yield _folded("The most frequent tags", html_table(["tag", "captions"], ([tag, str(count)] for tag, count in facts.frequent)))
    if facts.likely_typos:
        rows = ([tag, other, str(count)] for tag, other, count in facts.likely_typos)
        yield _folded("Tags that may be misspelt", html_table(["tag", "is near to", "captions"], rows))
    yield "</section>"


def _costs(report: Report) -> Iterator[str]:
    if report.caches:
        yield f"<section><h2>Caches and time</h2>{html_table(CACHE_HEADER, map(cache_row, report.caches))}</section>"
    if report.time is not None:
        yield f"<p>{escape(time_sentence(report.time))}</p>"


def _section(section: Section) -> Iterator[str]:
    yield f"<section><h2>{escape(section.title)}</h2>"
    if section.digest is None:
        yield html_table(section.header, section.rows)
    else:
        yield html_table(section.header, section.digest)
        yield _folded(f"All {len(section.rows)}", html_table(section.header, section.rows))
    yield from (f"<p>{escape(line)}</p>" for line in section.lines)
    yield "</section>"


# Pictures


def _sheet(sheet: Sheet) -> Iterator[str]:
    role = ", validation" if sheet.role == "validation" else ""
    all_of_them = counted(sheet.images, "image")
    shown = f"{len(sheet.shots)} of {all_of_them}" if len(sheet.shots) < sheet.images else all_of_them
    yield f'<section id="{_anchor(sheet.role, sheet.dataset, sheet.size)}">'
    yield f'<h2>{size_name(sheet.size)} <small>dataset {sheet.dataset}{role}, {shown}</small></h2><div class="sheet">'
    yield from map(_shot, sheet.shots)
    yield "</div></section>"


def _shot(shot: Shot) -> str:
    """A picture with its caption, of which a long one unfolds, and what was done to it."""
    caption = escape(shot.caption) or "<i>empty</i>"
    picture = (
        f'<img alt="" loading="lazy" title="{escape(shot.caption)}" src="data:image/jpeg;base64,{shot.jpeg}">'
        if shot.jpeg is not None
        else f'<p class="problem">{escape(shot.problem)}</p>'
    )
    name = escape(shot.file.replace("\\", "/").rsplit("/", 1)[-1])
    written = f"<dt>written</dt><dd>{escape(shot.written)}</dd>" if shot.written != shot.caption else ""
    short = escape(shot.caption[:SHORT]) + "..." if len(shot.caption) > SHORT else caption
    return (
        f"<figure>{picture}<figcaption><details><summary>{short}</summary><dl><dt>read</dt><dd>{caption}</dd>{written}"
        f"<dt>file</dt><dd>{escape(shot.file)}, {shot.repeats} times an epoch</dd></dl></details>"
        f"<small>{name}: {escape('; '.join(shot.marks))}</small></figcaption></figure>"
    )


def _anchor(role: str, dataset: int, size: tuple[int, int]) -> str:
    return f"{role}-{dataset}-{size_name(size)}"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"
