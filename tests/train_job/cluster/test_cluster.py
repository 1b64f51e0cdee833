"""What workers get of a cluster, and how a Ray that we start gives training priority."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gptcore.config import ModelConfig
from gptcore.errors import ConfigError, NoMemory
from gptcore.model import GPT
from gptcore.package import save_package
from gptcore.tokenizer import load_tokenizer
from train_job.cluster.connect import require_room, resources_per_worker
from train_job.config import build_config

CHILDREN = """
import os, subprocess, sys
from train_job.cluster.connect import training_first
names = ["ray::RayTrainWorker", "ray::Channel"]
children = [subprocess.Popen([sys.executable, "-c", "input()", name], stdin=subprocess.PIPE) for name in names]
training_first()
print(*(os.sched_getscheduler(pid) for pid in [0, *(child.pid for child in children)]))
for child in children:
    child.kill()
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no SCHED_IDLE")
def test_helper_processes_have_a_lower_priority_than_the_worker_and_the_driver() -> None:
    found = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, check=True).stdout
    assert found.split() == [str(policy) for policy in (os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_IDLE)]


def test_simultaneous_runs_share_the_cluster_and_too_many_are_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}]
    config = build_config({"num_workers": "2"})
    assert [resources_per_worker(config, nodes, runs=n)["CPU"] for n in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match="with 1 CPUs each for each of 5 at once; there is room for 8"):
        resources_per_worker(config, nodes, fixed=True, runs=5)


def test_the_messages_of_a_run_need_neither_torch_nor_ray() -> None:
    code = "import sys, train_job.cluster.channel; print({'torch', 'ray', 'mlflow', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_model_too_large_for_any_memory_here_is_refused_with_the_figures() -> None:
    huge = ModelConfig(vocab_size=256, hidden_size=65536, num_layers=1024, num_heads=1024, context_length=64)
    with pytest.raises(NoMemory, match=r"training this model needs [0-9,]+ MiB of memory .* weights, .* are free"):
        require_room(build_config({}), huge, None)
    small = ModelConfig(vocab_size=256, hidden_size=64, num_layers=2, num_heads=2, context_length=64)
    require_room(build_config({"num_workers": "2"}), small, None)


def test_adapters_need_room_beside_frozen_weights_and_the_parents_copy(tmp_path: Path) -> None:
    shape = ModelConfig(vocab_size=320, hidden_size=64, num_layers=2, num_heads=2, context_length=64)
    huge = replace(shape, hidden_size=65536, num_layers=1024, num_heads=1024, head_dim=64)
    config = build_config({"init_from": "somewhere", "lora_rank": 2})
    parent = save_package(tmp_path / "parent", shape, GPT(shape).state_dict(), load_tokenizer("bytes"), {})
    with pytest.raises(NoMemory, match=r"object store, [0-9,]+ for frozen weights, [0-9,]+ for adapters, .* are free"):
        require_room(config, huge, parent)
    require_room(config, shape, parent)
