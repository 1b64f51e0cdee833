"""deploy/kuberay: KubeRay's operator and Kubernetes accept each file and refuse mistakes in it.

Against schema.py; against the operator's own definitions too where `KUBERAY_CRDS` names them, or where they lie beside
the checkout.
"""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import SHARED
from tests.deploy.crd.schema import (
    JOB,
    OPERATED,
    SERVICE,
    STORAGE,
    Mistake,
    check,
    check_kubernetes,
    cluster_of,
    read,
    structural,
    templates,
)


@pytest.mark.parametrize("name", OPERATED)
def test_kuberay_accepts_the_file(name: str):
    check(read(name))


def test_kubernetes_accepts_the_claim_for_the_shared_folder():
    claim = read(STORAGE)
    check_kubernetes(claim)
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes(JOB) if "persistentVolumeClaim" in v]
    assert set(claims) == {claim["metadata"]["name"]}


def volumes(name: str) -> list[dict[str, Any]]:
    return [volume for template in templates(read(name)) for volume in template["spec"].get("volumes", [])]


SERVICE_MISTAKES: dict[str, Mistake] = {
    "an unknown field": lambda r: r["spec"].update(serveConfig=""),
    "an upgrade without its steps": lambda r: r["spec"]["upgradeStrategy"]["clusterUpgradeOptions"].pop(
        "stepSizePercent"
    ),
    "an upgrade without an autoscaler": lambda r: cluster_of(r).update(enableInTreeAutoscaling=False),
    "an unknown way to authenticate": lambda r: cluster_of(r)["authOptions"].update(mode="password"),
    "authentication for an unknown Ray": lambda r: cluster_of(r).pop("rayVersion"),
    "a number among Ray's flags": lambda r: cluster_of(r)["headGroupSpec"].update(rayStartParams={"num-cpus": 0}),
    "a pod with an unknown field": lambda r: templates(r)[0]["spec"].update(securitycontext={}),
    "a variable that is a number": lambda r: templates(r)[0]["spec"]["containers"][0]["env"].append(
        {"name": "RAY_USAGE_STATS_ENABLED", "value": 0}
    ),
    "an autoscaler that asks for nonsense": lambda r: cluster_of(r)["autoscalerOptions"].update(resources={"cpu": 1}),
}


@pytest.mark.parametrize("mistake", SERVICE_MISTAKES)
def test_kuberay_refuses_a_bad_file(mistake: str):
    resource = json.loads(json.dumps(read(SERVICE)))  # a copy, in which YAML's anchors are not shared
    SERVICE_MISTAKES[mistake](resource)
    with pytest.raises(jsonschema.ValidationError):
        check(resource)


@pytest.mark.parametrize("name", OPERATED)
def test_the_operators_own_definitions_accept_the_file(name: str):
    folder = Path(os.environ.get("KUBERAY_CRDS") or SHARED / "kuberay-crds")
    if "KUBERAY_CRDS" not in os.environ and not folder.is_dir():
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's definitions: tests/deploy/crd/README.md")
    definition = yaml.safe_load((folder / f"ray.io_{read(name)['kind'].lower()}s.yaml").read_text())
    jsonschema.Draft202012Validator(structural(definition)).validate(read(name))


def test_unknown_fields_are_refused_unless_a_definition_allows_them():
    spec = {"type": "object", "properties": {"size": {"type": "integer"}}}
    kept = {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True}
    top = {"type": "object", "properties": {"spec": spec, "kept": kept, "metadata": {"type": "object"}}}
    definition = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": top}}]}}
    validator = jsonschema.Draft202012Validator(structural(definition))
    validator.validate({"metadata": {"name": "any"}, "spec": {"size": 1}, "kept": {"more": 1}})
    assert not validator.is_valid({"spec": {"sise": 1}})
    assert not validator.is_valid({"spec": {"size": "1"}})
