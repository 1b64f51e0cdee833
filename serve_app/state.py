"""What every route may use, in one value: what the service was told, the models it holds, and where it counts."""

from dataclasses import dataclass

from serve_app.metrics import Metrics
from serve_app.models.catalog import Models
from serve_app.settings import ServeSettings


@dataclass(frozen=True)
class AppState:
    """Made once per app, and handed to each `router(state)`."""

    settings: ServeSettings
    models: Models
    metrics: Metrics
