"""The devices there are, in which precisions they compute well, and whether they compile."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from library.core.compiler import check_compiler
from library.core.devices import fp8_refusal
from tools.health.finding import Finding, Patient, fail, first_line, gigabytes, ok, warn

SIDE, SIDE_ON_CPU = 1024, 256  # of the matrices; half precision may be emulated on a CPU
HALVES = {"bf16": (torch.bfloat16, 0.02), "fp16": (torch.float16, 0.005)}
"""Name -> dtype, and the relative error that a product may have."""
TIMES_SLOWER = 3  # than fp32: as good as emulated
LITTLE = 4 * 2**30  # bytes free on a GPU


def every_device() -> tuple[torch.device, ...]:
    """The CPU, and every GPU that torch sees."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    return (torch.device("cpu"), *gpus, *mps)


def devices(patient: Patient) -> Iterator[Finding]:
    """torch's build, every device, its precisions, its compiler."""
    yield _build()
    for device in patient.devices:
        if device.type == "cuda":
            yield _gpu(device)
        yield from (_half(device, name) for name in HALVES)
        yield _fp8(device)
        yield _compiler(device)


def _build() -> Finding:
    """torch, and whether it is the build for this machine's GPU."""
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if torch.cuda.is_available():
        driver = _driver()
        return ok("torch", f"{text}, {torch.cuda.device_count()} GPUs{f', driver {driver}' if driver else ''}")
    if torch.backends.mps.is_available():
        return ok("torch", f"{text}, Apple's MPS")
    if torch.version.hip is None and _has_nvidia_gpu():
        advice = (
            "install torch's CUDA build (https://pytorch.org)" if torch.version.cuda is None else "update the NVIDIA driver, and restart"
        )
        return fail("torch", f"{text}: there is an NVIDIA GPU, and torch does not see it", advice)
    return warn("torch", f"{text}: no GPU", "training the full models on a CPU takes weeks; the small ones of the demo are fine")


def _has_nvidia_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or bool(_driver())


def _driver() -> str | None:
    """The version of the NVIDIA driver, where its tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # it stands there, but no driver answers
    return next(iter(answer.stdout.split()), None)


def _gpu(device: torch.device) -> Finding:
    """Its name, capability and memory."""
    facts = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    text = f"{facts.name}, capability {facts.major}.{facts.minor}, {gigabytes(free)} of {gigabytes(total)} free"
    arch = f"sm_{facts.major}{facts.minor}"
    known = torch.cuda.get_arch_list()
    if known and not any(_runs_on(entry, facts.major, facts.minor) for entry in known):
        return fail(str(device), f"{text}: this torch has no code for {arch}, only {', '.join(known)}", "install another build of torch")
    if free < LITTLE:
        return warn(str(device), text, "other programs hold its memory (nvidia-smi shows them); end them")
    return ok(str(device), text)


def _runs_on(entry: str, major: int, minor: int) -> bool:
    """Does code for `sm_86` or `compute_90` run on a GPU of this capability? PTX does on all later ones, binaries within a generation."""
    kind, _, digits = entry.partition("_")
    numbers = "".join(letter for letter in digits if letter.isdigit())
    of = (int(numbers[:-1]), int(numbers[-1]))
    return of <= (major, minor) if kind == "compute" else of[0] == major and of[1] <= minor


def _half(device: torch.device, name: str) -> Finding:
    """A product in half precision: whether it is right, and how fast beside fp32."""
    dtype, bound = HALVES[name]
    subject = f"{name} on {device}"
    values = torch.Generator().manual_seed(0)
    side = SIDE_ON_CPU if device.type == "cpu" else SIDE
    a, b = (torch.randn(side, side, generator=values) for _ in range(2))
    try:
        halves = a.to(device, dtype), b.to(device, dtype)
        product = (halves[0] @ halves[1]).float().cpu()
        slowness = _seconds(*halves) / _seconds(a.to(device), b.to(device))
    except RuntimeError as error:
        return warn(subject, f"does not compute: {first_line(error)}", "train with another --mixed_precision")
    exact = a.double() @ b.double()
    error = float((product - exact).norm() / exact.norm())
    text = f"relative error {error:.1e}, {slowness:.2g} times the time of fp32"
    if not error <= bound:
        return fail(subject, text, f"products in {name} are wrong here; train with another --mixed_precision, and update the driver")
    if slowness > TIMES_SLOWER:
        return warn(subject, text, f"{name} is emulated here; --mixed_precision no is faster")
    return ok(subject, text)


def _seconds(a: Tensor, b: Tensor, turns: int = 5) -> float:
    """The least time of a product."""
    times = []
    for _ in range(turns):
        started = time.perf_counter()
        _ = a @ b
        if a.device.type == "cuda":
            torch.cuda.synchronize(a.device)
        elif a.device.type == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _fp8(device: torch.device) -> Finding:
    refusal = fp8_refusal(device)
    if refusal is None:
        return ok(f"fp8 on {device}", "weights can be kept in float8_e4m3fn (--fp8_base)")
    return warn(f"fp8 on {device}", refusal, "train without --fp8_base and --fp8_scaled")


def _compiler(device: torch.device) -> Finding:
    try:
        check_compiler(device)
    except ValueError as error:
        needs = "Triton" if device.type == "cuda" else "a C++ compiler"
        return warn(f"compiler on {device}", first_line(error), f"train without --compile, or install {needs}")
    return ok(f"compiler on {device}", "torch.compile works (--compile)")
