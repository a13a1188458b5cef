"""Real-time scheduling for the threads that a late command would come from."""

from __future__ import annotations

import os

CONTROL_PRIORITY = 40
"""The control thread: below the kernel's interrupt threads (50)."""

SERVICE_PRIORITY = 20
"""Every other thread of the control process. They share Python's interpreter lock with the control
thread, so one that is put aside while it holds the lock would keep the control thread waiting."""


def request_realtime(priority: int) -> bool:
    """Ask for SCHED_FIFO for the calling thread; what it starts gets the normal scheduler.

    Permitted to root, with CAP_SYS_NICE or with an rtprio limit; see README.

    Args:
        priority: 1 (low) to 99.

    Returns:
        False where it is not permitted: the thread goes on as it was.
    """
    try:
        # On Linux pid 0 means the calling thread.
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except (AttributeError, OSError):
        return False
    return True
