"""Limits what `serve run` prints to the service's own lines and to warnings and errors of Ray and Serve.

Misleading warnings of Ray are hidden too. Ray's log folder has everything.
"""

import re

from ray._private import ray_logging
from ray.serve.schema import LoggingConfig

SERVE_LOGGING = LoggingConfig(log_level="WARNING")
"""For Serve's controller and proxies. Replicas use the service's own logging."""
MISLEADING = re.compile(
    "|".join(
        (
            r"Task ServeController\.graceful_shutdown failed",  # the controller stopped as it was asked to
            r"won't accept connections from HAProxy on other nodes",  # intended on loopback
        )
    )
)


def hide_misleading_warnings() -> None:
    """Hide misleading warnings in this terminal, unless RAY_DEDUP_LOGS_SKIP_REGEX sets its own pattern."""
    for lines in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        lines.skip_re = lines.skip_re or MISLEADING
