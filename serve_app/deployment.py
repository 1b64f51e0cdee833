"""The Ray Serve application: one deployment whose replicas run the HTTP app and the engines together.

Builds an application from settings, for `serve run`, `serve build` and Serve configs. App and engines share a replica
because a second hop would halve the request rate. Ray scales, replaces and drains replicas; `serve_app.models` decides
which model version answers. What only a replica needs, torch above all, is imported there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import httpx2
import ray
from ray import serve
from ray.serve import metrics as ray_metrics
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from gptcore.cores import available_cores
from gptcore.engine.settings import target_ongoing_requests
from gptcore.errors import ConfigError
from gptcore.home import home
from serve_app.feedback import open_log
from serve_app.front import haproxy
from serve_app.front.unavailable import RETRY_AFTER_SECONDS
from serve_app.ray_private import dashboard_later, hide_lines, listening_host, wait_for_proxies
from serve_app.settings import ServeSettings, load_settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve_app.metrics import Metric
    from serve_app.models.catalog import Models
    from serve_app.models.load import MakeEngine

log = logging.getLogger(__name__)

NAME = "gpt"
SPARE_REQUESTS = 10_000
"""Requests that a replica with full engines still accepts: probes, pages, and requests still sending their body."""
GAUGE_SECONDS = 5.0
HEALTH_SECONDS = 1.0
"""Interval of Ray's health checks of a replica."""
SURGE_PERCENT = 25
"""Extra replicas during a rolling update, rounded up, so that none stops before its successor is ready."""
START_SECONDS = 600
"""How long `serve run` waits for a proxy on a busy machine."""
LOOK_BACK_S = 15.0
"""The autoscaler's time window. Replicas report every 10 s, and the window must contain at least one report."""
DASHBOARD_SECONDS = 60
"""Ray's dashboard of a local service starts after the first replica, or after so long."""
SERVE_LOGGING = LoggingConfig(log_level="WARNING")
"""For Serve's controller and proxies. Replicas use the service's own logging. Ray's log folder has everything."""
MISLEADING = re.compile(
    r"Task ServeController\.graceful_shutdown failed"  # the controller stopped as it was asked to
    r"|won't accept connections from HAProxy on other nodes"  # intended on loopback
)
"""Warnings that `serve run` does not print."""


class Service:
    """A replica: the models and the HTTP app."""

    def __init__(self, settings: ServeSettings, make_engine: MakeEngine | None = None) -> None:
        from gptcore.engine.engines import make_engine as ours
        from serve_app.http.app import create_api
        from serve_app.metrics import Metrics
        from serve_app.models.catalog import Models

        settings = replace(settings, threads=settings.threads or threads_of(settings), host=listening_host())
        self.models = Models(settings, make_engine=make_engine or ours)
        self.metrics = Metrics(RaySink())
        self.api = create_api(settings, self.models, self.metrics, tag_replies=False)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray, as `serve.ingress` documents; requests are accepted once the eager models have been tried."""
        await self.models.start()
        warn_of_few_slots(self.models)
        self._gauges = asyncio.create_task(self._push_gauges())
        return self.api

    async def check_health(self) -> None:
        """Raises if an engine has died; Ray then replaces this replica."""
        self.models.check_health()

    async def __del__(self) -> None:
        """Called by Ray when the replica's requests have ended or its drain time is over."""
        self._gauges.cancel()
        await self.models.close()

    async def _push_gauges(self) -> None:
        while True:
            await asyncio.sleep(GAUGE_SECONDS)
            self.metrics.push_gauges()


class RaySink:
    """Sends the metrics to Ray's exporter, which adds the deployment and the replica as labels."""

    def __init__(self) -> None:
        from serve_app.metrics import METRICS

        self._kept: dict[str, Any] = {metric.name: _ray_metric(metric) for metric in METRICS}

    def __call__(self, metric: Metric, labels: dict[str, str], value: float) -> None:
        """A `serve_app.metrics.Sink`."""
        kept = self._kept[metric.name]
        match metric.kind:
            case "counter":
                if value:  # Ray refuses 0
                    kept.inc(value, labels)
            case "gauge":
                kept.set(value, labels)
            case "histogram":
                kept.observe(value, labels)


def build_app(args: Mapping[str, Any], make_engine: MakeEngine | None = None) -> serve.Application:
    """`build` from named settings, which override the environment's. Errors are those of Serve's command line.

    Under `serve run`, this also starts Serve on the configured host and port.
    """
    try:
        settings = load_settings(args)
        open_log(settings.feedback, settings.feedback_bytes)  # a wrong place is an error here, not in every replica
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    command = click.get_current_context(silent=True)
    if command and command.info_name == "run":
        address = command.params.get("address") or os.environ.get("RAY_ADDRESS")
        _check_address(settings, address)
        if address in (None, "", "auto", "local"):  # a remote Ray has its own environment
            if settings.engine == "vllm":
                _require_vllm()
            haproxy.use_haproxy(body_seconds=settings.body_timeout_s, request_seconds=settings.request_timeout_s)
        return build(settings, make_engine, local=_listen(settings, command.params))
    return build(settings, make_engine)


def build(settings: ServeSettings, make_engine: MakeEngine | None = None, local: bool = False) -> serve.Application:
    """The application, with Ray's part of the settings; `local` if replicas have this process's environment."""
    models = len({*settings.sources, settings.canary_name} - {""})
    deployment: Any = serve.deployment(
        name=NAME,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            look_back_period_s=LOOK_BACK_S,
        ),
        # More than the engines accept, so that they refuse requests, in the API's own form. Ray's queue is for times
        # without any replica: starting from zero, or replacing the only one.
        max_ongoing_requests=models * settings.places + SPARE_REQUESTS,
        max_queued_requests=settings.max_queue,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_SECONDS),
        health_check_period_s=HEALTH_SECONDS,
        max_surge_percent=SURGE_PERCENT,
        graceful_shutdown_timeout_s=settings.drain,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LoggingConfig(enable_access_log=False),  # the middleware logs requests
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.gpus,
            # The same caches as here. With an environment of its own, a replica starts a second later.
            "runtime_env": {} if local else {"env_vars": {"GPT_FOUNDRY_HOME": str(home())}},
        },
    )
    return deployment(serve.ingress()(Service)).bind(settings, make_engine)


def warn_of_few_slots(models: Models) -> None:
    """Logs a warning if memory holds fewer slots than autoscaling assumes, so that requests would wait for a slot."""
    settings = models.settings
    if settings.target_ongoing_requests or settings.max_replicas == 1:
        return
    for served in models.loaded():
        slots = served.engine.info.slots
        if (fits := target_ongoing_requests(slots)) < settings.target_ongoing:
            log.warning(
                "%s has only %d slots, but autoscaling adds a replica at %g requests each; set "
                "target_ongoing_requests=%g",
                served.label,
                slots,
                settings.target_ongoing,
                fits,
            )


def threads_of(settings: ServeSettings) -> int:
    """The CPUs that Ray reserves for a replica; if none, an equal share of this machine's."""
    return max(1, int(settings.num_cpus) or available_cores() // settings.max_replicas)


def _check_address(settings: ServeSettings, ray_address: str | None) -> None:
    """End `serve run` with a one-line error if the address is unavailable; Ray would print pages."""
    if ray_address not in (None, "", "auto", "local"):
        return  # the address is on another machine
    six = ":" in settings.host
    try:
        socket.create_server((settings.host, settings.port), family=socket.AF_INET6 if six else socket.AF_INET).close()
    except OSError as error:
        address = f"[{settings.host}]:{settings.port}" if six else f"{settings.host}:{settings.port}"
        if error.errno != errno.EADDRINUSE:
            raise click.ClickException(f"cannot listen on {address}: {error.strerror}") from None
        if not _is_serve(address.replace("0.0.0.0", "127.0.0.1")):  # a running Serve will run this application
            raise click.ClickException(
                f"cannot listen on {address}: it is in use; choose another port, such as port={settings.port + 1}"
            ) from None


def _require_vllm() -> None:
    """End `serve run` if vLLM is not installed; a replica could only say so in /models."""
    from gptcore.engine.vllm_engine import require_vllm

    try:
        require_vllm()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def _is_serve(address: str) -> bool:
    """Whether Ray Serve listens on that address."""
    try:
        with httpx2.stream("GET", f"http://{address}/-/healthz", timeout=5, trust_env=False) as answer:
            return next(answer.iter_bytes(), b"") == b"success"  # another server's answer may never end
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return False


def _listen(settings: ServeSettings, flags: Mapping[str, Any]) -> bool:
    """Start Serve on the configured address, with little output. `flags` are those of `serve run`.

    Returns whether Ray was started here, too, so that its processes have this environment.
    """
    hide_lines(MISLEADING)
    if ray.is_initialized():
        return False
    wanted = HTTPOptions(host=settings.host, port=settings.port)
    if any(flags.get(name) for name in ("runtime_env", "runtime_env_json", "working_dir")):
        if (wanted.host, wanted.port) == (HTTPOptions().host, HTTPOptions().port):
            return False  # Ray's default, too
        raise click.ClickException(
            "host and port cannot be combined with a runtime environment; put both into a config like deploy/serve.yaml"
        )
    wait_for_proxies(START_SECONDS)
    os.environ["GPT_FOUNDRY_HOME"] = str(home())
    with dashboard_later() as dashboard:
        ray.init(address=flags.get("address"), namespace="serve")
    serve.start(http_options=wanted, logging_config=SERVE_LOGGING)
    for start in dashboard:
        threading.Thread(target=_once_deployed, args=(start,), daemon=True).start()
    return bool(dashboard)


def _once_deployed(start: Callable[[], None]) -> None:
    """Call `start` once an application runs or has failed, or does neither for long. Its start comes first."""
    patience = time.monotonic() + DASHBOARD_SECONDS
    under_way = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING)
    with contextlib.suppress(ray.exceptions.RayError, RayServeException):  # `serve run` has ended
        while time.monotonic() < patience and all(a.status in under_way for a in serve.status().applications.values()):
            time.sleep(1)
        start()


def _ray_metric(metric: Metric) -> Any:
    labels: Any = metric.labels  # Ray's annotation is for a single label
    if metric.kind == "histogram":
        return ray_metrics.Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=labels)
    kind = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
    return kind(metric.name, metric.help, tag_keys=labels)
