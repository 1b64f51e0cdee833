"""Ray Train on a Ray of the job's own, without the helper processes that only a shared cluster needs.

Ray Train expects a cluster that many share and that may grow. So its controller starts helpers that watch over what a
dead controller may leave behind, that ask for machines, and that hand out Ray's datasets. Each helper is a process that
imports Ray Train, and the worker waits for its turn. A Ray of our own ends with the job, cannot grow, and reads no
datasets.

Ray's private modules are used here, as tried with Ray 2.60; tests/train_job/cluster/test_internals.py looks at it.
"""

from typing import Any

import ray
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer

NOT_NEEDED = (DatasetsCallback, PlacementGroupCleanerCallback)


class OwnTrainer(TorchTrainer):
    """A TorchTrainer whose processes have the environment of this Ray, so that those started in advance fit."""

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NOT_NEEDED)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling: Any = self.scaling_config  # mypy takes it for an older one
        if not scaling.elasticity_enabled:
            parts["scaling_policy"] = FixedWorkers(scaling)
        controller: Any = ray.remote(num_cpus=0)(TrainController).remote(**parts)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class FixedWorkers(FixedScalingPolicy):
    """As many workers as were asked for, without asking an autoscaler for machines."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs in the controller: its workers inherit its environment, and get none of their own."""
        constants.ENV_VARS_TO_PROPAGATE.clear()

    def _maybe_send_resource_request(self) -> None:
        pass
