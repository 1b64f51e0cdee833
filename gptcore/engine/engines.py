"""Chooses the engine for a model: our own, or vLLM."""

from gptcore.engine.engine import Engine
from gptcore.engine.interface import Stepped
from gptcore.engine.settings import EngineSettings
from gptcore.engine.vllm_engine import VllmEngine
from gptcore.package import Package


def make_engine(package: Package, settings: EngineSettings) -> Stepped:
    """The engine that `settings.engine` names, with the model loaded. Raises ConfigError or PackageError."""
    return VllmEngine(package, settings) if settings.engine == "vllm" else Engine(package, settings)
