"""Processes that train side by side, one thread each; none outlives the command that began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from ..device import quiet_libraries
from ..errors import Mgp5Error


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes. On leaving, what runs is finished, what waits is dropped.

    Raises Mgp5Error when one of them has died.
    """
    pool = ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BrokenProcessPool:
        hint = "was there memory enough? Go on by the same command, perhaps with fewer --jobs"
        raise Mgp5Error("a process that trained has died", hint) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a new process, before it imports what it is to do."""
    torch.set_num_threads(1)
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the command that is interrupted
    command = multiprocessing.parent_process()
    threading.Thread(target=lambda: (command.join(), os._exit(1)), daemon=True).start()  # also when it is killed
