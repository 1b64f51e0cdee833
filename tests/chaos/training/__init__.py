"""Faults of training. What is promised: a run that is killed, or whose disk or server fails, can always go on.

Its final weights are then those of a run that nothing happened to, to the bit. It is one MLflow run, which has every
step once, and one registered version. What cannot go on says so in one line and keeps the last good checkpoint.
"""

from collections.abc import Sequence

from tests.chaos.fault import Fault
from tests.chaos.training.disks import (
    changed_text,
    changed_tokens,
    damaged_checkpoints,
    full_disk,
    read_only_disk,
    slow_disk,
    store_failing,
)
from tests.chaos.training.killed import host_lost, kills, three_seconds
from tests.chaos.training.numbers import clock_moved, not_a_number
from tests.chaos.training.site import site
from tests.chaos.training.tracking import tracking, tracking_gone

__all__ = ["FAULTS", "site"]

SAME = "identical weights, each step once, one MLflow run, one version"
RESUMED = f"one line says so; after a resume {SAME}"
STORE = "object storage failing every third call"
GONE = "the tracking server gone, or its password expired, to the end"
TRACKING = "the tracking server away, wrong, late, or failing every third call; its database locked"
BACK = "refused by name; resumed once it is back"
NAMED = "names the step, keeps the last good checkpoint"
FAULTS: Sequence[Fault] = [
    Fault("training", "kills", "kill -9 of a worker, the driver or the raylet, in one run", SAME, kills),
    Fault("training", "sigterm", "SIGTERM, and kill -9 three seconds later", SAME, three_seconds),
    Fault("training", "host", "a whole host lost", SAME, host_lost),
    Fault("training", "damage", "a checkpoint's file cut or one bit changed", "never read", damaged_checkpoints),
    Fault("training", "disk", "the disk full", RESUMED, full_disk),
    Fault("training", "read-only", "the disk read-only", RESUMED, read_only_disk),
    Fault("training", "slow-disk", "each write 0.2 s late", SAME, slow_disk),
    Fault("training", "store", STORE, SAME, store_failing),
    Fault("training", "data", "the tokens' files deleted or changed, and the worker killed", SAME, changed_tokens),
    Fault("training", "text", "the text changed before a resume", BACK, changed_text),
    Fault("training", "nan", "a loss that is not a number", NAMED, not_a_number),
    Fault("training", "clock", "the clock an hour behind, then an hour ahead", SAME, clock_moved),
    Fault("training", "tracking", TRACKING, SAME, tracking),
    Fault("training", "tracking-gone", GONE, f"after a resume {SAME}", tracking_gone),
]
