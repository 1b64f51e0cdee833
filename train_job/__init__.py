"""Trains a model on text and registers it as a version in MLflow.

`cluster` and the commands use Ray, `tracking` uses MLflow, and the training loop needs only torch.
"""

import gptcore  # noqa: F401  # checks the version of Python
