"""The time that files are dated with."""

import os
import time

PINNED = "SOURCE_DATE_EPOCH"  # https://reproducible-builds.org/specs/source-date-epoch/


def now() -> float:
    """Seconds since 1970, or those of the environment variable SOURCE_DATE_EPOCH: then two equal runs leave equal bytes.

    Raises `ValueError` where the variable is no number.
    """
    pinned = os.environ.get(PINNED)
    if pinned is None:
        return time.time()
    try:
        return float(int(pinned))
    except ValueError as error:
        raise ValueError(f"{PINNED}={pinned}: whole seconds since 1970 are needed") from error


def dated(pattern: str) -> str:
    """`now` in local time by `time.strftime`'s pattern; a pinned time is told in UTC."""
    moment = time.gmtime(now()) if PINNED in os.environ else time.localtime(now())
    return time.strftime(pattern, moment)
