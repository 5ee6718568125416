"""What a rank's batches count in the mean of a step."""

from collections.abc import Sequence

from library.data.batch import Batch


def counted(batches: Sequence[Batch], whole: int, world: int) -> float:
    """What to divide the sum of a rank's losses by, so that the mean over `world` ranks is the mean over the step's real batches.

    That is the number of `batches` but in the last turn of an epoch of `whole` batches: ranks that have none left get copies of weight
    0, and the real ones count for them. One process with the same batches takes the same step.
    """
    fillers = sum(max(0, batch.position - batch.position % world + world - whole) for batch in batches)
    return (len(batches) * world - fillers) / world
