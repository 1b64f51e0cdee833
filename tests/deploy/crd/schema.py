"""Checks a RayJob or RayService as an API server with KubeRay's operator would, without either.

In: a resource as YAML has it. Out: nothing, or the jsonschema.ValidationError that names the field at fault.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.system.conftest import ROOT

JOB, SERVICE = OPERATED = ["deploy/kuberay/rayjob.yaml", "deploy/kuberay/rayservice.yaml"]
STORAGE = "deploy/kuberay/storage.yaml"
KUBERNETES = "1.33"
FIELDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())

Mistake = Callable[[dict[str, Any]], object]


def read(name: str) -> dict[str, Any]:
    """A file of the checkout."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


def check(resource: dict[str, Any]) -> None:
    """Raises if a field of KubeRay, or of Kubernetes in a pod, is invalid."""
    jsonschema.Draft202012Validator(FIELDS).validate(resource)
    for template in templates(resource):
        check_kubernetes({"kind": "Pod", "metadata": {"name": "any"}, **template})
    options = cluster_of(resource).get("autoscalerOptions", {})
    names = {"env", "envFrom", "resources", "securityContext", "volumeMounts"} & options.keys()
    autoscaler = {"name": "autoscaler", "image": "any"} | {name: options[name] for name in names}
    check_kubernetes({"kind": "Pod", "metadata": {"name": "any"}, "spec": {"containers": [autoscaler]}})


def check_kubernetes(resource: dict[str, Any]) -> None:
    """Raises if a resource of Kubernetes itself has an unknown or invalid field."""
    kubernetes_validate.validate({"apiVersion": "v1", **resource}, KUBERNETES, strict=True)


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster in a RayJob or RayService."""
    spec: dict[str, Any] = resource["spec"]
    cluster: dict[str, Any] = spec["rayClusterSpec" if resource["kind"] == "RayJob" else "rayClusterConfig"]
    return cluster


def templates(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pod template in it: the submitter's, the head's, the workers'."""
    cluster = cluster_of(resource)
    submitter = [t for key, t in resource["spec"].items() if key == "submitterPodTemplate"]
    return [*submitter, *(group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]))]


def structural(definition: dict[str, Any], version: str = "v1") -> dict[str, Any]:
    """The schema in a CustomResourceDefinition, made strict: unknown fields are errors."""
    (found,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == version]
    fields = found["properties"] | {"metadata": {"type": "object"}}  # the API server checks it itself
    schema: dict[str, Any] = _closed(found | {"properties": fields})
    return schema


def _closed(part: Any) -> Any:
    if isinstance(part, list):
        return [_closed(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    part = {key: _closed(inner) for key, inner in part.items()}
    if part.get("type") == "object" and "properties" in part and not part.get("x-kubernetes-preserve-unknown-fields"):
        part.setdefault("additionalProperties", False)
    return part
