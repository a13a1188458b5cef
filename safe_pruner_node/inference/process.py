"""What a worker process does to itself before anything else."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 * 1024 * 1024
"""The most that glibc takes as a threshold; images and the tensors of a CPU's step are below."""


def die_with_parent(parent_pid: int) -> None:
    """Be killed by the kernel when the thread that started this process ends.

    Args:
        parent_pid: The process that started this one. If it ended before the request was in
            place this process has another parent already, and leaves.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent_pid:
        sys.exit(1)


def yield_to_control(niceness: int) -> None:
    """Lower this process's priority, and leave Ctrl-C to the parent to decide about.

    Args:
        niceness: Added to the nice value, 0..19.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A control process under real-time scheduling must not hand that down.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.nice(niceness)


def keep_freed_memory() -> None:
    """Keep freed memory for the next step, instead of giving it back to the kernel.

    Every step needs the same megabytes for its images again. To fault in their pages one by one
    cost up to 1 ms of 3.6 for a 1280x720 JPEG; whether glibc keeps them by itself depends on what
    was allocated before.
    """
    libc = ctypes.CDLL(None)
    for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        libc.mallopt(threshold, _KEPT_BYTES)
