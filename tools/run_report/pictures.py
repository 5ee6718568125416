"""The previews of a run as a grid: a row for each prompt and strength, a column for each moment."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape

from PIL import Image, UnidentifiedImageError

from tools.run_report.reading import Preview

SIDE = 512  # longest side of a picture on the page
MOST_MOMENTS = 12
MOST_ROWS = 24
QUALITY = 82


def grid_html(previews: Sequence[Preview]) -> str:
    """The grid; a sentence where there is none, and where a part of it is left out."""
    if not previews:
        return '<p class="none">No previews: the run drew none (--sample_prompts), or they are not in its sample folder.</p>'
    moments = list(dict.fromkeys((preview.step, preview.moment) for preview in previews))
    shown = spread_over(moments, MOST_MOMENTS)
    rows = sorted({(preview.number, preview.strength) for preview in previews}, key=lambda row: (row[0], row[1] is None, row[1] or 0))
    by_place = {(preview.number, preview.strength, preview.moment): preview for preview in previews}
    header = "".join(f"<th>{escape(_moment(step, moment))}</th>" for step, moment in shown)
    body = "".join(_row(row, [by_place.get((*row, moment)) for _, moment in shown]) for row in rows[:MOST_ROWS])
    return "".join(
        [
            *_left_out(len(moments) - len(shown), "moments"),
            *_left_out(len(rows) - len(rows[:MOST_ROWS]), "prompts"),
            f'<div class="wide"><table class="grid"><thead><tr><th></th>{header}</tr></thead><tbody>{body}</tbody></table></div>',
        ]
    )


def spread_over(items: Sequence, most: int) -> list:
    """At most `most` of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def picture_url(preview: Preview) -> tuple[str, str]:
    """A data: URL of the picture, made smaller, and its prompt. Raises `OSError` for a file that is no picture."""
    with Image.open(preview.path) as picture:
        prompt = str(picture.info.get("prompt", ""))
        small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", prompt


def _row(row: tuple[int, float | None], previews: Sequence[Preview | None]) -> str:
    number, strength = row
    cells, prompt, seed = [], "", None
    for preview in previews:
        if preview is None:
            cells.append('<td class="none">not drawn</td>')
            continue
        try:
            url, prompt = picture_url(preview)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            cells.append(f'<td class="none">{escape(preview.path.name)}: no picture ({escape(str(error)[:80])})</td>')
            continue
        seed = preview.seed
        title = escape(f"{prompt}, {_moment(preview.step, preview.moment)}{_strength(strength)}")
        cells.append(f'<td><img class="zoom" alt="{title}" title="{title}" src="{url}"></td>')
    seeded = f"<small>seed {seed}</small>" if seed is not None else ""
    power = f'<span class="strength">x {strength:g}</span>' if strength is not None else ""
    return f"<tr><th>{power}<b>{escape(prompt) or f'prompt {number + 1}'}</b>{seeded}</th>{''.join(cells)}</tr>"


def _moment(step: int, moment: str) -> str:
    if moment.startswith("e"):
        return f"epoch {int(moment[1:])}, step {step}"
    return f"step {step}" if step else "before the first step"


def _strength(strength: float | None) -> str:
    return "" if strength is None else f", strength {strength:g}"


def _left_out(count: int, what: str) -> Iterator[str]:
    if count > 0:
        yield f'<p class="none">{count} more {what} are in the sample folder.</p>'
