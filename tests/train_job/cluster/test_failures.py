"""Ray's reports of a worker's failure become one line of ours."""

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError  # type: ignore[attr-defined]
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from train_job.cluster.failures import SMALLER, explained, why

DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed"
)
PRESSED = (
    "Task was killed due to the node running low on memory.\\nMemory on the node (IP: 10.0.0.2) was 14.67GB used.\\n"
    "OOM kill reason: Memory usage exceeded threshold.\\nRefer to the documentation on how to address it: "
    "https://docs.ray.io/en/latest/ray-core/scheduling/ray-oom-prevention.html"
)


def died(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = text
    return error


def test_out_of_memory_is_reported_with_advice_and_without_rays_paragraph():
    for error in (OutOfMemoryError(PRESSED), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")):
        said = explained({0: error})
        assert said == f"worker 0 was killed or failed for lack of memory; {SMALLER}"
    assert SMALLER in why(WorkerGroupError(PRESSED, {1: OutOfMemoryError(PRESSED)}))
    assert SMALLER in why(ControllerError(OutOfMemoryError(PRESSED)))


def test_a_killed_process_is_reported_as_out_of_memory_only_if_linux_says_so():
    assert explained({0: died(DIED)}) == "worker 0 lost its process: something outside killed it, or it crashed"
    assert SMALLER in explained({0: died(DIED)}, kernel_killed=True)
    looked_at = WorkerHealthCheckFailedError("A worker health check failed.", died(DIED))  # as Ray Train has it
    assert explained({0: looked_at}) == explained({0: died(DIED)})


def test_a_lost_machine_and_a_silent_worker_are_distinguished_from_a_lost_process():
    assert explained({0: died("The actor died because its node has died. Node Id: 12")}).endswith("with its machine")
    assert "health check" in explained({0: RuntimeError("Worker health check failed.")})


def test_the_failure_that_caused_the_others_is_reported():
    others = {0: RuntimeError("Connection closed by peer"), 1: died(DIED)}
    assert explained(others).startswith("worker 1 lost its process")


@pytest.mark.parametrize(
    "text", ["", "ValueError: a b c", "Traceback:\n  File x\nValueError: a b c\nsee https://x.y/z"]
)
def test_any_other_failure_is_reported_by_its_last_line_without_addresses(text: str):
    assert explained({0: ValueError(text)}) == f"worker 0 failed: {'ValueError: a b c' if text else 'ValueError'}"


def test_a_process_that_could_not_begin_is_reported_with_its_error():
    unreachable = died(
        "The actor died because of an error raised in its creation task, \x1b[36mray::Controller.__init__()"
        "\x1b[39m\nTraceback (most recent call last):\n  File x\nOSError: the bucket 'runs' cannot be reached"
    )
    assert why(unreachable) == "OSError: the bucket 'runs' cannot be reached"
    assert explained({0: unreachable}) == "worker 0 failed: OSError: the bucket 'runs' cannot be reached"
    assert why(died(DIED)) == "a process of Ray's was lost"
