"""Counting the bytes of tensors while they live, whether they are real or fake."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Within it, `alive` are the bytes of living tensors that operations made, and `peak` the most there were at once.

    What was there before is not counted. Allocators round sizes up and keep freed memory, which is not counted either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [storage for storage in storages(result) if storage._cdata not in given]
        for storage in made:
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        self.note(func, args, launches=bool(made) or func._schema.is_mutable)
        return result

    def note(self, func: Any, args: Any, launches: bool) -> None:
        """Hear of an operation that was done; it `launches` a kernel if it made or changed something. Here nothing is kept of it."""

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.alive -= size


def storages(values: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors in nested values."""
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the distinct storages of some tensors."""
    found = {storage._cdata: storage.nbytes() for storage in storages(list(tensors))}
    return sum(found.values())
