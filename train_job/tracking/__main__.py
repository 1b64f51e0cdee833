"""`python -m train_job.tracking`: the tracking address, MLflow's pages, and what waits to be delivered."""

import sys

from train_job.tracking.client import main

if __name__ == "__main__":
    sys.exit(main())
