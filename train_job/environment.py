"""The environment that Ray, MLflow and Ray Tune read when they are imported. Import this before any of them.

A value that the user has set stays.
"""

import os
from pathlib import Path

DEFAULTS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's new tables are printed whatever it is told
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a sweep writes the same to files of our own
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_CONFIGURE_LOGGING": "false",  # its INFO lines would stand between ours
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one more process, and nothing here reads its news
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for this poll, 2 s by default
}

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
if (Path.home() / ".ray" / "auth_token").exists():
    # Ray shows its token by itself only to a cluster that it found by itself; it looks when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")

LIGHT = "GPT_FOUNDRY_LIGHT"
"""Set for a process of Ray's that needs nothing of what training imports (`train_job.cluster.preload`)."""
