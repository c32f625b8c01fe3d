"""The latest results of a function, each computed once, also where several threads ask for it at the same time."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def once(function: Callable[[int], Result], kept: int) -> Callable[[int], Result]:
    """`function`, whose `kept` latest results are remembered. An error is raised to all who wait for it, and forgotten.

    `functools.lru_cache` computes a result as often as it is asked for before it is there.
    """
    known: collections.OrderedDict[int, concurrent.futures.Future] = collections.OrderedDict()
    lock = threading.Lock()

    def ask(key: int) -> Result:
        with lock:
            future = known.get(key)
            mine = future is None
            if future is None:
                future = known[key] = concurrent.futures.Future()
            known.move_to_end(key)
            for old in [other for other, made in known.items() if made.done()][:max(len(known) - kept, 0)]:
                del known[old]
        if mine:
            try:
                future.set_result(function(key))
            except BaseException as error:
                with lock:
                    known.pop(key, None)
                future.set_exception(error)
        return future.result()

    return ask
