"""A Ray of our own leaves the cores to training."""

import os
import subprocess
import sys

import pytest

CHILDREN = """
import os, subprocess, sys
from train_job.cluster import training_first
names = ["ray::RayTrainWorker", "ray::Board"]
children = [subprocess.Popen([sys.executable, "-c", "input()", name], stdin=subprocess.PIPE) for name in names]
training_first()
print(*(os.sched_getscheduler(pid) for pid in [0, *(child.pid for child in children)]))
for child in children:
    child.kill()
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no SCHED_IDLE")
def test_helpers_yield_to_the_training_worker_and_to_the_driver() -> None:
    found = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(policy) for policy in (os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_IDLE)]
