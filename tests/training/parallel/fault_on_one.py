"""Run by two processes: a training script in which the loss of one batch is not a number, on one rank only.

fault_on_one.py FAMILY RANK BATCH OPTIONS...
"""

import math
import os
import sys
from dataclasses import replace
from typing import Any

from library.core.command_line import run_script
from library.data.batch import Batch
from library.training import update
from library.training.run import main
from library.training.step import BatchLoss

family, rank, at, *options = sys.argv[1:]
whole, calls = update.batch_loss, []


def broken(context: Any, batch: Batch) -> BatchLoss:
    """The loss; of the batch that was asked for, counted from 0, not a number."""
    calls.append(batch.position)
    loss = whole(context, batch)
    faulty = os.environ["RANK"] == rank and len(calls) == int(at) + 1
    return replace(loss, of_samples=loss.of_samples * math.nan) if faulty else loss


if __name__ == "__main__":
    update.batch_loss = broken
    sys.argv[1:] = options
    run_script(lambda argv: main(family, argv))
