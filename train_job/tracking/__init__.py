"""MLflow: runs, their metrics and files, registered versions, and promotion to @champion."""
