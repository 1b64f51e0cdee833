"""What `serve run` prints: the service's own lines and what is wrong, not how Ray does its work.

In: Ray and Serve as they come, which tell every step of their own, HAProxy's command line among them. Out: warnings and
errors, but for those that say nothing about this service. Ray's log folder has everything.
"""

import re

from ray._private import ray_logging
from ray.serve.schema import LoggingConfig

SERVE_LOGGING = LoggingConfig(log_level="WARNING")
"""Of Serve's controller and fronts. Replicas have the service's own."""
MISLEADING = re.compile(
    "|".join(
        (
            r"Task ServeController\.graceful_shutdown failed",  # the controller ends with what it was asked to do
            r"won't accept connections from HAProxy on other nodes",  # nor is it to, where it listens on loopback
        )
    )
)


def hush() -> None:
    """Keeps what misleads out of this terminal, unless RAY_DEDUP_LOGS_SKIP_REGEX says what to leave out."""
    for lines in (ray_logging.stdout_deduplicator, ray_logging.stderr_deduplicator):
        lines.skip_re = lines.skip_re or MISLEADING
