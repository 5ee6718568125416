"""What a checkpoint says of its own prediction: by empty tensors in a single file, by the scheduler's configuration in a folder."""

import json
from pathlib import Path

from library.core.log import get_logger
from library.core.tensor_file import read_header
from library.diffusion.ddpm import PredictionOptions

logger = get_logger(__name__)
VELOCITY, ZERO_SNR = "v_pred", "ztsnr"
MARKS = (VELOCITY, ZERO_SNR)
"""Names of the empty tensors of a file that predicts velocity, and of one whose last timestep is pure noise."""


def check_prediction(path: Path, options: PredictionOptions) -> None:
    """Do the options say what the checkpoint says of itself?

    Raises `ValueError` with the options to give where the checkpoint says more. Where the options say more it is logged, and they hold:
    most files say nothing.
    """
    marks = _folder_marks(path) if path.is_dir() else {mark: f"it has the tensor '{mark}'" for mark in MARKS if mark in _keys(path)}
    needed = {
        "--v_parameterization": bool(marks) and not options.v_parameterization,
        "--zero_terminal_snr": ZERO_SNR in marks and not options.zero_terminal_snr,
    }
    if missing := [flag for flag, is_missing in needed.items() if is_missing]:
        says = "predicts velocity" + (" and ends in pure noise" if ZERO_SNR in marks else "")
        raise ValueError(f"{path}: {says} ({'; '.join(marks.values())}); give {' and '.join(missing)}")
    if options.v_parameterization and VELOCITY not in marks:
        logger.info("%s does not say what it predicts: taken to predict velocity, as --v_parameterization says", path)


def _keys(path: Path) -> frozenset[str]:
    return frozenset(read_header(path).tensors)


def _folder_marks(folder: Path) -> dict[str, str]:
    """The marks that the scheduler of a diffusers folder bears, and where they stand."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    found = {VELOCITY: ("prediction_type", "v_prediction"), ZERO_SNR: ("rescale_betas_zero_snr", True)}
    return {mark: f"{key} in {file.name}" for mark, (key, value) in found.items() if isinstance(config, dict) and config.get(key) == value}
