"""What the processes of a job's own Ray import before they are needed: `RAY_preload_python_modules` names this module.

So they import while the driver opens the run, and not while it waits for the first step. Ray gives them out in any
order, so Ray Train's own processes import what only workers need.
"""

import os

from train_job.environment import LIGHT

if LIGHT not in os.environ:
    import train_job.cluster.own
    import train_job.cluster.worker  # noqa: F401
