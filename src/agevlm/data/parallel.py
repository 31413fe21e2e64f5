"""Runs a function over jobs in processes of their own, in the order of the jobs."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any

from agevlm.progress import Bar


_state: Any  # of a worker


@contextmanager
def worker_pool(workers: int, setup: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that are started afresh ("spawn") and end with this one, also when it fails or is killed.

    Args:
        setup, arguments: called with them in every process before its first job.
    """
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch can hang
    # Not `context.Pool`: it would start workers that cannot run again and again, without an end.
    with ProcessPoolExecutor(workers, context, _start, (setup, *arguments)) as pool:
        try:
            yield pool
        except BaseException:  # one job that fails need not wait for the others; SIGTERM reaches this process alone
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def worker_map(workers: int, make: Callable[..., Any], *arguments: Any) -> Iterator[Callable]:
    """`map` over a `worker_pool`: functions come from modules, scripts guard their main part. One worker is this
    process.

    Args:
        make, arguments: what they give is made once in every process, and is each function's first argument.

    Raises:
        ValueError: workers cannot run.
    """
    if workers <= 1:
        state = make(*arguments)
        yield lambda function, jobs: map(partial(function, state), jobs)
        return
    try:
        with worker_pool(workers, _prepare, make, *arguments) as pool:
            yield lambda function, jobs: pool.map(partial(_work, function), jobs)
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker process ended before its work was done ({workers} workers): out of memory, a script "
            'without `if __name__ == "__main__":`, or code from standard input. Run it again with fewer.'
        ) from error


def _start(setup: Callable[..., None], *arguments: Any) -> None:
    """In a worker: ends it when its parent ends, however that was killed, and prepares its jobs."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setup(*arguments)


def _prepare(make: Callable[..., Any], *arguments: Any) -> None:
    global _state
    _state = make(*arguments)


def _work(function: Callable[[Any, Any], Any], job: Any) -> Any:
    return function(_state, job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # workers have one
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def run_jobs(
    function: Callable[[Any, Any], Any], jobs: Sequence[Any], state: tuple, workers: int, what: str, progress: bool
) -> Iterator[Any]:
    """What `function` returns for `state` and each job (a `count` of rows), in their order, with a bar that is called
    `what`; see `worker_map`."""
    bar = Bar(total=sum(job.count for job in jobs), desc=what, unit="row", disable=not progress)
    with bar, worker_map(workers, tuple, state) as work:
        for job, result in zip(jobs, work(function, jobs), strict=True):
            yield result
            bar.update(job.count)
