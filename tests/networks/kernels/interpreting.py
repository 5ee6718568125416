"""A process whose Triton interprets kernels on the CPU. It cannot be this one: Triton asks TRITON_INTERPRET once, when it is imported."""

import functools
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def interpreted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of an importable function, called in that process."""
    return pickle.loads(_process().submit(run, pickle.dumps((function, args, kwargs))).result())


@functools.cache
def _process() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool.submit(multiply_bfloat16).result()  # the process starts here, and keeps the environment
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    return pool


def run(call: bytes) -> bytes:
    """In that process: a pickled call to its pickled result."""
    function, args, kwargs = pickle.loads(call)
    return pickle.dumps(function(*args, **kwargs))


def multiply_bfloat16() -> None:
    """In that process: the interpreter holds bfloat16 as integers, and would multiply those in `tl.dot`; float32 products are the same."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float, tl

    dot = InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle(_convert_float(operand.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
