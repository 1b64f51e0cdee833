"""Workers of one run on this machine: processes that call a function together, in a gloo process group."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PATIENCE_SECONDS = 500


class Workers:
    """Processes that live until the block ends, so that each imports torch only once."""

    def __init__(self, pipes: list[Connection], scratch: Path) -> None:
        self._pipes, self._scratch, self._calls = pipes, scratch, 0

    def call(self, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns in each of `count` workers, by rank. Raises AssertionError if one fails."""
        self._calls += 1
        meeting = f"file://{self._scratch}/{self._calls}"
        for rank, pipe in enumerate(self._pipes[:count]):
            pipe.send((rank, count, meeting, function, args))
        answers: dict[int, Any] = {}
        while len(answers) < count:
            waiting = {self._pipes[rank]: rank for rank in range(count) if rank not in answers}
            ready = wait([*waiting], PATIENCE_SECONDS)
            assert ready, f"workers {sorted(waiting.values())} do not answer"
            for pipe in ready:
                failure, answers[waiting[pipe]] = pipe.recv()  # type: ignore[index, union-attr]
                assert not failure, f"worker {waiting[pipe]}: {failure}"  # type: ignore[index]
        return [answers[rank] for rank in range(count)]


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """`count` idle workers, of which a call uses as many as it needs."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))  # what torch frees, the process no longer has
        patch.setenv("MALLOC_ARENA_MAX", "1")  # a part for each thread would grow with the number of threads that run
        pipes, processes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(theirs,), daemon=True))
            processes[-1].start()
            pipes.append(ours)
        try:
            yield Workers(pipes, Path(scratch))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        rank, count, meeting, function, args = pipe.recv()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
        try:
            pipe.send(("", function(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        finally:
            dist.destroy_process_group()
