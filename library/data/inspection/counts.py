"""The numbers of a run's data: images, uses, batches, buckets, and what resizing and cropping cost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from library.data.config import Dataset
from library.data.dataset import TrainingData
from library.data.entries import ImageEntry
from library.data.inspection.findings import BucketFacts, DatasetFacts, Finding, FolderFacts, Role, finding
from library.data.options import Size

WORST = 8  # files that are named
MUCH_LOST = 0.25  # share of an image that a person would miss
MUCH_ENLARGED = 1.5


@dataclass(frozen=True)
class Part:
    """Images of one dataset with one role."""

    number: int  # of the dataset, from 0
    role: Role
    dataset: Dataset
    images: list[ImageEntry]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"dataset {self.number + 1}" + (" (validation)" if self.role == "validation" else "")


def parts_of(data: TrainingData) -> Iterator[Part]:
    """The datasets, and after them what is held out of each for validation; those without images are left out."""
    sources: list[tuple[Role, TrainingData | None]] = [("training", data), ("validation", data.validation)]
    for role, source in sources:
        for number, dataset in enumerate(data.datasets):
            images = [image for image in source.images if image.dataset == number] if source is not None else []
            if images:
                yield Part(number, role, dataset, images)


def dataset_facts(part: Part) -> DatasetFacts:
    """The numbers of one part."""
    images, size = part.images, part.dataset.options.batch_size
    buckets = _buckets(images, size)
    lost = sorted(((str(image.path), lost_share(image)) for image in images), key=lambda each: -each[1])
    enlarged = sorted(((str(image.path), enlarged_by(image)) for image in images if enlarged_by(image) > 1), key=lambda each: -each[1])
    return DatasetFacts(
        number=part.number + 1,
        role=part.role,
        resolution=part.dataset.options.size,
        batch_size=size,
        images=len(images),
        uses=sum(image.repeats for image in images),
        reg_uses=sum(image.repeats for image in images if image.options.is_reg),
        batches=sum(bucket.batches for bucket in buckets),
        partial=sum(bucket.last_batch < size for bucket in buckets),
        buckets=tuple(buckets),
        folders=tuple(_folders(part)),
        lost=sum(share for _, share in lost) / len(images),
        worst_crops=tuple((name, round(share, 4)) for name, share in lost[:WORST] if share > 0),
        enlarged=len(enlarged),
        most_enlarged=tuple((name, round(factor, 3)) for name, factor in enlarged[:WORST]),
    )


def lost_share(image: ImageEntry) -> float:
    """The share of an image's pixels, as resized, that its crop leaves out."""
    placement = image.placement
    return 1 - placement.bucket[0] * placement.bucket[1] / (placement.resized[0] * placement.resized[1])


def enlarged_by(image: ImageEntry) -> float:
    """By which factor an image's sides grow to cover its bucket; below 1 where they shrink."""
    return max(new / old for new, old in zip(image.placement.resized, image.size, strict=True))


def count_findings(part: Part, facts: DatasetFacts) -> Iterator[Finding]:
    """What a person should know about the numbers of one part."""
    images = part.images
    cut = [image for image in images if lost_share(image) > MUCH_LOST]
    if cut:
        text = f"{part.name}: crops that leave out more than {MUCH_LOST:.0%} of an image: {len(cut)} of {len(images)}"
        advice = "" if part.dataset.options.enable_bucket else "; enable_bucket = true keeps their shapes"
        worst = sorted(cut, key=lambda image: -lost_share(image))
        yield finding("warning", "crops", text + advice, _named(worst, lambda image: f"{lost_share(image):.0%} of {_size(image.size)}"))
    small = sorted((image for image in images if enlarged_by(image) > MUCH_ENLARGED), key=lambda image: -enlarged_by(image))
    if small:
        text = f"{part.name}: images enlarged more than {MUCH_ENLARGED:g} times, which makes them soft: {len(small)} of {len(images)}"
        advice = "; with bucket_no_upscale = true they keep their size"
        yield finding("warning", "enlarged", text + advice, _named(small, lambda image: f"{enlarged_by(image):.2f}x {_size(image.size)}"))
    elif facts.enlarged:
        text = f"{part.name}: images a little smaller than their bucket, which are enlarged: {facts.enlarged} of {len(images)}"
        yield finding("note", "enlarged", text, (f"{name}: {factor:.2f}x" for name, factor in facts.most_enlarged))
    if part.role == "training":
        yield from _batch_findings(part, facts)


def _batch_findings(part: Part, facts: DatasetFacts) -> Iterator[Finding]:
    short = [bucket for bucket in facts.buckets if bucket.last_batch < facts.batch_size]
    if short and facts.partial * 4 > facts.batches:
        text = f"{part.name}: batches that are not full, and weigh as much as full ones: {facts.partial} of {facts.batches} in an epoch"
        details = (f"{_size(bucket.size)}: {bucket.uses} uses, the last batch has {bucket.last_batch}" for bucket in short[:WORST])
        yield finding("note", "batches", text, details)
    training = facts.uses - facts.reg_uses
    if facts.reg_uses:
        repeats = max(image.repeats for image in part.images if image.options.is_reg)
        text = f"{facts.reg_uses} uses of regularisation images, each repeated up to {repeats} times, for {training} of the others"
        yield finding("note", "balance", f"{part.name}: {text}")
    shares = {folder.name: folder.uses / training for folder in facts.folders if not folder.is_reg and training}
    for name, share in shares.items():
        if len(shares) > 1 and share < 0.02 / len(shares):
            text = f"{part.name}: {name} is {share:.1%} of the uses in an epoch; raise its num_repeats if it shall be learnt"
            yield finding("note", "balance", text)


# Buckets and folders


def _buckets(images: Sequence[ImageEntry], batch_size: int) -> list[BucketFacts]:
    groups: dict[Size, list[ImageEntry]] = {}
    for image in images:
        groups.setdefault(image.placement.bucket, []).append(image)
    facts = []
    for size, group in sorted(groups.items()):
        uses = sum(image.repeats for image in group)
        facts.append(
            BucketFacts(
                size=size,
                images=len(group),
                uses=uses,
                batches=-(-uses // batch_size),
                last_batch=uses % batch_size or batch_size,
                lost=sum(map(lost_share, group)) / len(group),
            )
        )
    return facts


def _folders(part: Part) -> Iterator[FolderFacts]:
    for number, subset in enumerate(part.dataset.subsets):
        images = [image for image in part.images if image.subset == number]
        if images:
            yield FolderFacts(
                name=subset.name,
                images=len(images),
                repeats=subset.num_repeats if part.role == "training" else 1,
                uses=sum(image.repeats for image in images),
                is_reg=subset.is_reg,
            )


# Words


def _named(images: Sequence[ImageEntry], what: Callable[[ImageEntry], str]) -> Iterator[str]:
    return (f"{image.path}: {what(image)}" for image in images[:WORST])


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
