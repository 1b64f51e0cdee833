"""The text of a run, tokenised by the cluster where there is much of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train_job.config import TrainConfig
from train_job.data.fetch import Origin
from train_job.data.inputs import Inputs, prepare_inputs


def prepare_on_cluster(
    config: TrainConfig, cluster: Callable[[], Any], begun: Mapping[str, Sequence[Origin]] | None
) -> Inputs:
    """`prepare_inputs`; `cluster` is called, and so started, once there is enough to tokenise in parallel.

    `begun` are the objects that a resumed run has read its text from: it goes on with the same.
    """

    def spread(fn: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        from train_job.cluster.ray_data import ray_map

        cluster()
        return ray_map(fn, items)

    return prepare_inputs(config, spread, refresh=begun is None, begun=begun)
