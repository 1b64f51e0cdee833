"""MLflow: runs, their metrics and files, registered versions and the gate in front of @champion."""
