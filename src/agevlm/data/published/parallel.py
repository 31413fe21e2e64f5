"""Runs a function over jobs in processes of their own, with a bar and in the order of the jobs."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm


def run_jobs(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    *,
    workers: int,
    setup: Callable[..., None],
    arguments: tuple,
    weight: Callable[[Any], int],
    description: str,
    progress: bool = True,
) -> Iterator[Any]:
    """What `function` returns for each job, in their order.

    Args:
        function, setup: of a module, so that processes started afresh ("spawn") find them.
        workers: number of processes; 1 works in this one.
        setup, arguments: called with them in every process before its first job.
        weight: how many rows of the bar a job stands for.

    Raises:
        ValueError: what the function raises, and workers that cannot run.
    """
    total = sum(map(weight, jobs))
    with tqdm(total=total, desc=description, unit="row", disable=not progress, file=sys.stderr) as bar:
        if workers <= 1:
            setup(*arguments)
            for job in jobs:
                yield function(job)
                bar.update(weight(job))
            return
        context = multiprocessing.get_context("spawn")  # forking a process that has run torch can hang
        with ProcessPoolExecutor(min(workers, max(1, len(jobs))), context, setup, arguments) as pool:
            try:
                for job, result in zip(jobs, pool.map(function, jobs), strict=True):
                    yield result
                    bar.update(weight(job))
            except BrokenProcessPool as error:
                raise ValueError(
                    f"a worker process ended before its work was done ({workers} workers): out of memory, or a "
                    'script without `if __name__ == "__main__":`. Run it again with fewer; it goes on where it was.'
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
