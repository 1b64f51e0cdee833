"""What every route can use: settings, models, metrics, and where votes are kept."""

from dataclasses import dataclass

from serve_app.feedback import FeedbackLog
from serve_app.metrics import Metrics
from serve_app.models.catalog import Models
from serve_app.settings import ServeSettings


@dataclass(frozen=True)
class AppState:
    """Made once per app and passed to each `router(state)`."""

    settings: ServeSettings
    models: Models
    metrics: Metrics
    feedback: FeedbackLog | None = None
