"""Joins or starts the Ray that a job runs on, and sets up its trainer.

In: a config, and RAY_ADDRESS. Out: Ray, connected; resources; a TorchTrainer. Ray is imported inside functions, since
that takes a second.
"""

import contextlib
import logging
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch

from gptcore.config import ModelConfig
from gptcore.devices import pick_dtype
from gptcore.errors import ConfigError
from gptcore.hf_format import count_parameters
from gptcore.lora import check_adapters
from gptcore.memory import free_memory, require_memory
from gptcore.package import Package
from gptcore.progress import doing
from train_job.cluster.discovery import OWN, cluster_address
from train_job.cluster.internals import bare_ray, drop_raylet_reports, use_own_process_groups
from train_job.config import TrainConfig
from train_job.session.console import without_log_lines
from train_job.training.hardware import WORKER_ENV

LOCAL_RAY = {
    "RAY_worker_niceness": "0",  # Ray's default of 15 gives training what other processes leave
    # Housekeeping for a dashboard, an autoscaler and a cloud, which our own Ray does not have. Each wakes processes
    # several times a second, at the expense of the training threads.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",  # processes that were started in advance
}
PRELOAD = {"RAY_preload_python_modules": "train_job.cluster.preload"}
RAY_TRAINS_OWN = 2
"""Ray Train's own processes: its controller, and a barrier for the workers."""


@contextlib.contextmanager
def ray_cluster(workers: int = 0) -> Iterator[tuple[Any, bool]]:
    """Connects to Ray within the block; yields the module, and whether this Ray was started for this run alone.

    If it was, it has started processes for so many `workers` that train on CPUs, and for Ray Train itself.
    """
    import ray

    quiet: dict[str, Any] = dict(logging_level=logging.ERROR, log_to_driver=False)
    address = cluster_address(os.environ.get("RAY_ADDRESS"))
    alone = address is None
    if alone:
        for name, value in (LOCAL_RAY | (WORKER_ENV if workers else {})).items():
            os.environ.setdefault(name, value)
        use_own_process_groups()
        ready = (workers + RAY_TRAINS_OWN, PRELOAD) if workers else (0, {})
        with doing("starting a Ray of this job's own"), bare_ray(*ready):
            _connect(ray, address="local", include_dashboard=False, **quiet)
    else:
        with doing(f"joining the Ray cluster at {address}"):
            try:
                _connect(ray, address=address, **quiet)
            except (ConnectionError, RuntimeError) as error:
                why = (str(error).splitlines() or [type(error).__name__])[0]
                raise ConfigError(f"the Ray cluster at {address} cannot be joined ({why}); {OWN}") from None
    try:
        yield ray, alone
    finally:
        ray.shutdown()


def training_first() -> None:
    """Gives Ray's helper processes, children of this one, Linux's idle priority, so that training comes first.

    Each of Ray's actors wakes a hundred times a second. Interrupting a training thread so often costs more than the
    work itself, since the other threads wait for it. Ray's two servers keep their priority: others wait for their
    heartbeats.
    """
    import psutil

    if not hasattr(os, "SCHED_IDLE"):
        return
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            if process.name() in ("raylet", "gcs_server") or "RayTrainWorker" in command or "ray::IDLE" in command:
                continue  # an idle one may become a worker after a failure
            for thread in process.threads():
                os.sched_setscheduler(thread.id, os.SCHED_IDLE, os.sched_param(0))


def _connect(ray: Any, **options: Any) -> None:
    """Calls ray.init and then restores the handler of SIGTERM, which Ray replaces by one that exits."""
    before = signal.getsignal(signal.SIGTERM)
    drop_raylet_reports()  # `failures` explains them
    try:
        with without_log_lines():
            ray.init(**options)
    except SystemExit as left:
        if left.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt(int(signal.SIGTERM)) from None  # the signal came during ray.init
    finally:
        signal.signal(signal.SIGTERM, before)


def resources_per_worker(
    config: TrainConfig, nodes: list[dict[str, Any]], fixed: bool = False, runs: int = 1
) -> dict[str, float]:
    """CPUs (and a GPU) for each worker: the largest whole number with which all workers fit into the cluster.

    `runs` is how many such runs there are at once. Raises ConfigError if the cluster is `fixed`, so no autoscaler can
    grow it, and too small for the fewest workers.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus, gpus = [r.get("CPU", 0) for r in alive], sum(r.get("GPU", 0) for r in alive)
    low, high = (runs * workers for workers in config.workers)
    share = config.cpus_per_worker
    if share is None:
        share = next((n for n in range(int(max(cpus)), 0, -1) if sum(c // n for c in cpus) >= high), 1)
    room = sum(c // share for c in cpus)
    together = f" for each of {runs} at once" if runs > 1 else ""
    if fixed and room < low:
        raise ConfigError(
            f"num_workers is {config.num_workers} with {share:g} CPUs each{together}; there is room for {room:g}. "
            "Use fewer, or lower --cpus-per-worker"
        )
    if fixed and config.use_gpu and gpus < low:
        raise ConfigError(f"use_gpu is set for {low} workers{together}, but Ray sees {gpus:g} GPUs")
    return {"CPU": share} | ({"GPU": 1} if config.use_gpu else {})


def require_room(config: TrainConfig, shape: ModelConfig, parent: Package | None) -> None:
    """Raises NoMemory if what the workers' models take, without activations, does not fit this machine's memory."""
    models = 1 if config.parallel == "fsdp" else config.workers[0]
    cpu, trained = torch.device("cpu"), count_parameters(shape)
    what = {}
    if parent:
        stored = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in parent.places().values())
        what["the parent in Ray's object store"] = stored
    if config.lora:
        what["frozen weights"] = models * trained * pick_dtype(config.precision, cpu).itemsize
        trained = check_adapters(shape, config.lora)
    needed = models * 4 * trained
    what |= {
        "adapters" if config.lora else "weights": needed,
        "gradients": needed,
        "at least one moment of each": needed,
    }
    what["the copy from which checkpoints are written"] = 2 * trained * 4  # dealt out to workers
    require_memory("training this model", what, free_memory(cpu))


def torch_trainer(train_worker: Any, spec: Any, resources: dict[str, float], own_ray: bool) -> Any:
    """Ray Train's trainer for a `WorkerSpec`: workers, storage, retries. `own_ray`: no other job shares this Ray."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from train_job.cluster.failures import Restarts

    trainer: Any
    if own_ray:
        from train_job.cluster.own import OwnTrainer as trainer
    else:
        from ray.train.torch import TorchTrainer as trainer
    # Processes of our own Ray have its environment, and with another one they could not be ready.
    inherited = own_ray and all(os.environ.get(name) == value for name, value in WORKER_ENV.items())
    low, high = spec.config.workers
    return trainer(
        # Not as `train_loop_config`: Ray Train's controller would import all that the workers need.
        lambda: train_worker(spec),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),  # type: ignore[arg-type]
            use_gpu=spec.config.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=spec.config.name,
            storage_path=spec.config.storage_path,
            worker_runtime_env={} if spec.config.use_gpu or inherited else {"env_vars": WORKER_ENV},  # type: ignore[call-arg]
            callbacks=[Restarts(spec.channel)],  # type: ignore[list-item]  # typed for Tune's callbacks
            failure_config=FailureConfig(max_failures=spec.config.max_failures),
        ),
    )


def resources_text(resources: dict[str, float]) -> str:
    """Such as "2 CPUs, 1 GPU"."""
    return ", ".join(f"{n:g} {kind}{'s' if n != 1 else ''}" for kind, n in resources.items())


def workers_text(low: int, high: int | None = None) -> str:
    """Such as "1 worker" or "2 to 4 workers"."""
    many = f"{low} to {high}" if high and high != low else str(low)
    return f"{many} worker{'' if many == '1' else 's'}"
