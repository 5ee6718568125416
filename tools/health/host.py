"""Cores, main memory, shared memory and open files: what this process may have of them."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.health.finding import Finding, Patient, gigabytes, ok, warn

CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
LITTLE_MEMORY, LITTLE_SHARED = 8 * 2**30, 2**30
FEW_FILES = 1024
UNLIMITED = 2**60  # bytes; what old control groups write where there is no limit


def host(patient: Patient) -> Iterator[Finding]:
    """What a container or its settings may have cut down."""
    yield _cores()
    yield _memory()
    if sys.platform == "linux":
        yield _shared_memory()
    if sys.platform != "win32":
        yield _open_files()


def _cores() -> Finding:
    """Cores of the machine, and how many of them are ours."""
    count = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if sys.platform == "linux" else count
    limit = cpu_limit(CGROUP)
    usable = min(mine, limit or mine)
    text = f"{usable:g} of {count} usable"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > usable:
        return warn("cores", f"{text}, but OMP_NUM_THREADS={threads}", f"set OMP_NUM_THREADS to {max(1, int(usable))} or fewer")
    if usable < 2:
        return warn("cores", text, "images are read beside training only where there are two: give this machine or container more")
    return ok("cores", text)


def _memory() -> Finding:
    """Main memory that can still be had."""
    free, limit = _available(), memory_limit(CGROUP)
    if limit is not None:
        free = min(free, limit) if free else limit
    if not free:
        return ok("memory", "this system does not tell how much is free")
    text = f"{gigabytes(free)} can be had{'' if limit is None else f', of a limit of {gigabytes(limit)}'}"
    if free < LITTLE_MEMORY:
        return warn("memory", text, "the full models need more while they are loaded; end other programs or give the container more")
    return ok("memory", text)


def _available() -> int:
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def _shared_memory() -> Finding:
    """Where workers hand batches over."""
    if not SHARED_MEMORY.is_dir():
        return warn("shared memory", f"no {SHARED_MEMORY}", "train with --max_data_loader_n_workers 0")
    size = shutil.disk_usage(SHARED_MEMORY)
    text = f"{gigabytes(size.free)} of {gigabytes(size.total)} free"
    if size.free < LITTLE_SHARED:
        advice = "workers may die of a bus error: start the container with --shm-size 8g, or train with --max_data_loader_n_workers 0"
        return warn("shared memory", text, advice)
    return ok("shared memory", text)


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FEW_FILES:
        return warn("open files", f"at most {soft}", f"raise the limit: ulimit -n {min(hard, 4096) if hard > 0 else 4096}")
    return ok("open files", f"at most {soft}")


def cpu_limit(root: Path) -> float | None:
    """The cores that a control group allows, or None where it sets no limit; versions 2 and 1."""
    two, quota, period = root / "cpu.max", root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"
    if two.is_file():
        allowed, span = two.read_text().split()
    elif quota.is_file() and period.is_file():
        allowed, span = quota.read_text().strip(), period.read_text().strip()
    else:
        return None
    return int(allowed) / int(span) if allowed not in ("max", "-1") else None


def memory_limit(root: Path) -> int | None:
    """The bytes that a control group leaves us, or None where it sets no limit; versions 2 and 1."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        if (root / limit).is_file():
            allowed = (root / limit).read_text().strip()
            taken = int((root / used).read_text()) if (root / used).is_file() else 0
            return None if allowed == "max" or int(allowed) > UNLIMITED else max(1, int(allowed) - taken)
    return None
