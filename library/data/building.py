"""From the options of a run to its data, with everything wrong in dataset file, images and captions said before a model is loaded."""

from collections import Counter

from library.core.log import get_logger
from library.core.options import OptionError
from library.data.cacheable import cache_problems
from library.data.config import read_datasets
from library.data.dataset import TrainingData
from library.data.finding import find_images
from library.data.idle import idle_keys
from library.data.images.buckets import bucket_problems
from library.data.images.crops import face_in_name
from library.data.options import DataOptions

logger = get_logger(__name__)


def build_training_data(
    options: DataOptions, *, seed: int, resolution_step: int, default_resolution: int, pixels_per_latent: int = 8
) -> TrainingData:
    """Read the dataset file (or folders), find and measure the images, read the captions.

    `resolution_step` is what the model needs of image sides; `default_resolution` the side where nobody names a resolution;
    `pixels_per_latent` the side of a latent position in pixels. Raises `OptionError` with everything wrong with the dataset file, or
    else everything wrong with the images and captions.
    """
    datasets = read_datasets(options, default_resolution)
    problems = [problem for dataset in datasets for problem in bucket_problems(dataset.options, resolution_step, dataset.where)]
    problems += cache_problems(datasets, options)
    if problems:
        raise OptionError(dict.fromkeys(problems))
    for sentence in dict.fromkeys(idle_keys(datasets, options)):
        logger.warning("%s", sentence)
    found = find_images(datasets, options, seed)
    data = TrainingData(datasets, found.training, options, seed, pixels_per_latent)
    if found.validation:
        data.validation = TrainingData(datasets, found.validation, options, seed, pixels_per_latent)
    _describe(data)
    _tell_missing_faces(data)
    return data


# What the log says


def _describe(data: TrainingData) -> None:
    regular = f" and {data.num_reg_images} of regularisation" if data.num_reg_images else ""
    logger.info(
        "data: %d images, %d uses an epoch%s, %d batches an epoch",
        len(data.images),
        data.num_train_images,
        regular,
        data.batches_per_epoch(),
    )
    if data.validation is not None:
        logger.info("validation: %d images, in none of these batches", len(data.validation.images))
    for index, dataset in enumerate(data.datasets):
        counts = ", ".join(f"{width}x{height}: {count}" for (width, height), count in data.bucket_counts(index).items())
        logger.info("dataset %d: batch size %d, %s", index + 1, dataset.options.batch_size, counts or "for validation only")


def _tell_missing_faces(data: TrainingData) -> None:
    """Warn where a crop around faces is asked for, and file names tell of none or of few."""
    asked: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for image in data.images:
        if image.options.face_crop_aug_range is not None:
            asked[image.options.name] += 1
            named[image.options.name] += face_in_name(image.path, image.size) is not None
    for name, count in asked.items():
        if named[name] < count:
            logger.warning(
                "%s: face_crop_aug_range has no effect on %d of %d images: their names do not end with a face, as _x_y_width_height",
                name, count - named[name], count,
            )  # fmt: skip
