"""The images of a run, read again from its lock file: counts, and a contact sheet as the model saw them in its first epoch."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from library.core.options import Given, declared, read_group
from library.data.building import build_training_data
from library.data.dataset import TrainingData
from library.data.inspection.contact_sheet import Sheet, Shot, contact_sheets
from library.data.options import DataOptions
from library.models.architecture import architecture_named
from library.training.reproduction.lock import Lock

SAMPLES = 12  # pictures of each bucket
MOST_SHEETS = 12


def dataset_html(lock: Lock | None) -> str:
    """The sheets; a sentence where the images cannot be read any more."""
    if lock is None:
        return '<p class="none">Not known: the run has no readable lock file.</p>'
    try:
        data = data_of(lock)
        sheets = list(contact_sheets(data, SAMPLES))
    except (ValueError, OSError) as error:
        return f'<p class="none">The images cannot be read now: {escape(str(error).splitlines()[0])}</p>'
    left = len(sheets) - MOST_SHEETS
    more = f'<p class="none">{left} more buckets are not shown; python -m tools.lint_dataset shows all.</p>' if left > 0 else ""
    return _counts(data) + "".join(map(_sheet, sheets[:MOST_SHEETS])) + more


def data_of(lock: Lock) -> TrainingData:
    """The data of the run that a lock file describes. Raises `ValueError` for files that are not there any more or were changed."""
    arch = architecture_named(str(lock.run.get("family")))
    names = {entry.name for entry in declared(DataOptions)}
    values: Mapping[str, Any] = {**lock.defaults, **lock.options}
    given = [Given(name, value, f"lock file ({name})", is_typed=True) for name, value in values.items() if name in names]
    return build_training_data(
        read_group(DataOptions, given),
        seed=int(lock.run.get("seed", 0)),
        resolution_step=arch.resolution_step,
        default_resolution=arch.default_resolution,
        pixels_per_latent=arch.pixels_per_latent,
    )


def _counts(data: TrainingData) -> str:
    held = f", {len(data.validation.images)} held out for validation" if data.validation is not None else ""
    reg = f" and {data.num_reg_images} of regularisation" if data.num_reg_images else ""
    return f"<p>{len(data.images)} images, {data.num_train_images} uses an epoch{reg}{held}.</p>"


def _sheet(sheet: Sheet) -> str:
    role = ", validation" if sheet.role == "validation" else ""
    shown = f"{len(sheet.shots)} of {sheet.images}" if len(sheet.shots) < sheet.images else str(sheet.images)
    width, height = sheet.size
    title = f"<h3>{width}x{height} <small>dataset {sheet.dataset}{role}, {shown} images</small></h3>"
    return f'{title}<div class="contact">{"".join(_shots(sheet))}</div>'


def _shots(sheet: Sheet) -> Iterator[str]:
    yield from map(_shot, sheet.shots)


def _shot(shot: Shot) -> str:
    name = shot.file.replace("\\", "/").rsplit("/", 1)[-1]
    if shot.jpeg is None:
        return f'<figure class="none">{escape(name)}: {escape(shot.problem)}</figure>'
    title = escape(f"{name}: {shot.caption or '(no caption)'}; {'; '.join(shot.marks)}")
    caption = escape(shot.caption) or "<i>no caption</i>"
    source = f"data:image/jpeg;base64,{shot.jpeg}"
    return f'<figure><img class="zoom" alt="{title}" title="{title}" src="{source}"><figcaption>{caption}</figcaption></figure>'
