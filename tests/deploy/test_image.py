"""The image: buildah builds it on a base from debootstrap, and the tests run its entry points.

A container here is what a container runtime starts: namespaces, the image's files, user and environment, and its entry
point as the first process. Its network has only a loopback interface.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.system.conftest import ROOT, SMALL
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SUITE = "bookworm"
TAG = "gpt-foundry-test"
BASE = "gpt-foundry-base"
CA = "etc/ssl/certs/ca-certificates.crt"
NAMESPACES = ["--pid", "--net", "--uts", "--ipc", "--mount"]
ENTER = """
root=$0
ip link set lo up
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
exec "$@"
"""


def run(*command: str | Path, **more: Any) -> str:
    """The output of `command`. Fails with the output if the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-8000:]}"
    return done.stdout


@dataclass(frozen=True)
class Index:
    """The package index of this machine's pip: builds need its settings, and images must not contain them."""

    options: dict[str, list[str]]

    @classmethod
    def of_this_machine(cls) -> "Index":
        """pip's own account of its configuration."""
        options = {}
        for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
            name, _, value = line.rpartition(".")[2].partition("=")
            if name in ("index-url", "extra-index-url", "find-links"):
                options[name] = value.strip("'\"").split()
        return cls(options)

    @property
    def urls(self) -> list[str]:
        return [url for urls in self.options.values() for url in urls]

    @property
    def folders(self) -> list[str]:
        """The paths that are folders of this machine, each as its mount point."""
        paths = [urlsplit(url).path for url in self.urls if urlsplit(url).scheme in ("", "file")]
        return sorted({str(Path(path).parent if path.endswith("/simple") else path) for path in paths})

    def secrets(self, folder: Path) -> list[str]:
        """pip's and uv's settings as the secrets of the Dockerfile."""
        lines = [f"{name} = {' '.join(urls)}" for name, urls in self.options.items()]
        (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        lines = [f"{n} = {json.dumps(v[0] if n == 'index-url' else v)}" for n, v in self.options.items()]
        ask = ["system-certs = true", "[pip]", 'index-strategy = "unsafe-best-match"']  # as pip chooses
        (folder / "uv.toml").write_text("\n".join([*ask, *lines, ""]))
        return [f"--secret=id={name},src={folder / name}" for name in ("pip.conf", "uv.toml")]


@dataclass
class Builder:
    """buildah with its own store."""

    folder: Path
    index: Index

    def __call__(self, *arguments: str | Path) -> str:
        places = [f"--root={self.folder / 'root'}", f"--runroot={self.folder / 'run'}"]
        return run("buildah", *places, *arguments).strip()

    def base(self, mirror: str) -> None:
        """A base image: Debian with Python and this machine's certificate authorities."""
        system = self.folder / "base"
        packages = "--include=ca-certificates,python3,python3-dev,python3-venv"
        command = ["debootstrap", "--variant=minbase", packages, SUITE, str(system), mirror]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"debootstrap cannot make a base: {done.stdout.strip().splitlines()[-1:]}")
        shutil.copy(f"/{CA}", system / CA)
        run("tar", "--create", "--file", self.folder / "base.tar", "--directory", system, ".")
        shutil.rmtree(system)
        container = self("from", "scratch")
        self("add", "--quiet", container, self.folder / "base.tar")
        self("commit", "--quiet", container, BASE)
        self("rm", container)
        (self.folder / "base.tar").unlink()

    def build(self, context: Path) -> str:
        """Builds the image. Returns the output."""
        # A machine with folders of packages has PyTorch's CPU build in one; elsewhere uv knows where PyTorch keeps it.
        backend = "" if self.index.folders else "cpu"
        arguments = [f"--build-arg=BASE_IMAGE=localhost/{BASE}", f"--build-arg=TORCH_BACKEND={backend}"]
        volumes = [f"--volume={folder}:{folder}:ro" for folder in self.index.folders]
        secrets = self.index.secrets(self.folder)
        how = ["--isolation=chroot", "--format=docker", "--layers", "--pull-never", f"--tag={TAG}"]
        return self("bud", *how, *arguments, *secrets, *volumes, context)

    def inspect(self) -> dict[str, Any]:
        """The image's configuration and history, as Docker has them."""
        found: dict[str, Any] = json.loads(self("inspect", "--type=image", TAG))["Docker"]
        return found

    def clear(self) -> None:
        """Removes everything that was built, and unmounts it."""
        self("rm", "--all")
        self("rmi", "--all", "--force")
        for mounted in psutil.disk_partitions(all=True):
            if Path(mounted.mountpoint).is_relative_to(self.folder):
                run("umount", mounted.mountpoint)


@dataclass
class Image:
    """The built image. Its containers share one file system, as if on a volume."""

    builder: Builder
    root: Path
    config: dict[str, Any]
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, words: tuple[str, ...], env: dict[str, str]) -> list[str]:
        """The command line that runs `words` as the image's user, in its folder and environment, with `env` added."""
        passwd = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        uid, gid, home = next((p[2], p[3], p[5]) for p in passwd if p[0] == self.config["User"])
        pairs = [f"HOME={home}", *self.config["Env"], *(f"{name}={value}" for name, value in env.items())]
        as_user = ["chroot", f"--userspec={uid}:{gid}", str(self.root)]
        return [*as_user, "env", "-i", f"--chdir={self.config['WorkingDir']}", *pairs, *words]

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """`docker run IMAGE WORDS`."""
        inside = self.command((*self.config["Entrypoint"], *(words or self.config["Cmd"])), env)
        unshare = ["unshare", *NAMESPACES, "--propagation=private", "--fork", "--kill-child"]
        command = [*unshare, "sh", "-euc", ENTER, str(self.root), *inside]
        with open(self.builder.folder / "said", "w") as said:
            process = subprocess.Popen(command, cwd="/", stdout=said, stderr=subprocess.STDOUT, text=True)
        self.running.append(process)
        return process

    def said(self) -> str:
        """The output of the container that was started last."""
        return (self.builder.folder / "said").read_text()

    def run(self, *words: str, **env: str) -> tuple[int, str]:
        """(exit code, output) of a container that ends."""
        return self.start(*words, **env).wait(), self.said()

    def execute(self, container: subprocess.Popen[str], *words: str, **env: str) -> tuple[int, str]:
        """`docker exec`: (exit code, output)."""
        first = str(first_process(container).pid)
        command = ["nsenter", f"--target={first}", *NAMESPACES, *self.command(words, env)]
        done = subprocess.run(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout


def first_process(container: subprocess.Popen[str]) -> psutil.Process:
    """The container's process 1."""
    found: psutil.Process = eventually(psutil.Process(container.pid).children, "the container has begun", 10)[0]
    return found


def mirror_of_this_machine() -> str:
    """The Debian mirror of this machine's apt. Skips the test on another system."""
    listed = run("apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages")
    for line in listed.splitlines():
        release, _, uri = line.partition(" ")
        if release == SUITE:
            return uri
    pytest.skip(f"apt knows no mirror of Debian {SUITE}")


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    missing = [name for name in ("buildah", "debootstrap", "unshare", "nsenter", "ip") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"the image is built by root with buildah and debootstrap; missing: {missing or 'root'}")
    mirror = mirror_of_this_machine()
    with tempfile.TemporaryDirectory(prefix="image-") as folder:  # gigabytes, which pytest would keep
        made = Builder(Path(folder), Index.of_this_machine())
        try:
            made.base(mirror)
            made.build(ROOT)
            yield made
        finally:
            made.clear()


@pytest.fixture(scope="module")
def image(builder: Builder) -> Iterator[Image]:
    container = builder("from", "--pull-never", TAG)
    made = Image(builder, Path(builder("mount", container)), builder.inspect()["config"])
    yield made
    for process in made.running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    builder("umount", container)


def test_the_image_has_the_code_and_its_packages_and_nothing_about_the_build_machine(
    builder: Builder, image: Image
) -> None:
    app = {path.name for path in (image.root / "app").iterdir()}
    assert app == {"LICENSE", "constraints.txt", "deploy", "gptcore", "pyproject.toml", "serve_app", "train_job"}
    assert {path.name for path in (image.root / "app/deploy").iterdir()} == {"entrypoint.sh", "serve.yaml"}
    hosts = [host for url in builder.index.urls if (host := urlsplit(url).hostname)]
    told = json.dumps(builder.inspect())
    for place in ("etc", "home", "root", "app", "data", "opt/venv/pyvenv.cfg", "opt/venv/bin"):
        files = [image.root / place] if (image.root / place).is_file() else (image.root / place).rglob("*")
        told += "".join(path.read_text(errors="replace") for path in files if path.is_file() and not path.is_symlink())
    leaked = [text for text in (*builder.index.urls, *builder.index.folders, *hosts) if text in told]
    assert leaked == []
    assert not list(image.root.glob("run/secrets/*"))
    for tool in ("opt/uv", "etc/pip.conf", "etc/uv", "root/.cache", "var/lib/apt/lists/*"):
        assert not list(image.root.glob(tool)), tool


def test_the_image_is_small_and_has_no_cuda_by_default(builder: Builder, image: Image) -> None:
    size = json.loads(builder("images", "--json", TAG))[0]["size"]
    parts = {part: run("du", "-sm", image.root / part).split()[0] for part in ("opt/venv", "usr", "app")}
    print(f"\nimage: {size}; MB of it: {parts}")
    assert int(parts["opt/venv"]) < 2300  # PyTorch for CUDA would be some gigabytes more
    code, said = image.run("python", "-c", "import torch; print(torch.version.cuda)")
    assert (code, said.strip()) == (0, "None")


def test_the_images_user_is_not_root_and_has_what_the_launcher_and_kuberay_need(image: Image) -> None:
    tools = "id -u; id -g; umask; pwd; command -v python ray serve rsync ssh wget g++ bash"
    for shell in (("bash", "-lc"), ("bash", "-c"), ("bash", "--login", "-c")):
        code, said = image.run(*shell, tools)
        assert code == 0, said
        assert said.split()[:4] == ["1000", "1000", "0022", "/app"]
        assert said.split()[4:7] == [f"/opt/venv/bin/{name}" for name in ("python", "ray", "serve")]
    # cluster.yaml and deploy/cluster-gcp.yaml would install these otherwise.
    code, said = image.run("python", "-c", "import boto3, gcsfs, googleapiclient.discovery, s3fs, pynvml")
    assert code == 0, said
    code, said = image.run("touch", "/app/x", "/opt/venv/x", "/usr/x")
    assert said.count("Permission denied") == 3


def test_the_entry_point_accepts_train_serve_and_ray_and_refuses_others_by_name(image: Image) -> None:
    code, said = image.run("train", "--help")
    assert (code, said.splitlines()[0].split()[:2]) == (0, ["usage:", "python"])
    [pinned] = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    assert image.run("ray", "--version") == (0, f"ray, version {pinned.removeprefix('ray==')}\n")
    code, said = image.run("serve", "--help")
    assert code == 0
    assert "deploy" in said  # Ray's own commands
    code, said = image.run("serve", "modle=x")
    assert code != 0
    assert "Did you mean 'model'?" in said
    code, said = image.run("train", "--max-step=3")
    assert code == 2
    assert "--max-steps" in said
    assert image.run("trian") == (
        2,
        "error: 'trian' is not a program; expected train, serve, ray, health or a program of the image\n",
    )


def test_torch_compile_finds_compiler_and_headers(image: Image) -> None:
    ask = "import torch; f = torch.compile(lambda x: x.sin() + 1); print(f(torch.zeros(4)).tolist())"
    code, said = image.run("python", "-c", ask)
    assert (code, said.strip()) == (0, "[1.0, 1.0, 1.0, 1.0]")
    assert list(image.root.glob("tmp/torchinductor_foundry/**/*.so"))


def serves_until_stopped(image: Image, port: int, check: list[str], service: subprocess.Popen[str], **env: str) -> None:
    """Waits for a service's health check, sends one request, and stops it as `docker stop` does."""

    def health() -> int:
        return image.execute(service, *check, **env)[0]

    # Once the entry point has given way to the service, which then takes seconds to listen.
    eventually(lambda: any("serve_app:" in word for word in first_process(service).cmdline()), "it begins", 30)
    assert health() == 1
    eventually(lambda: service.poll() is not None or health() == 0, "the service is healthy", 120)
    assert service.poll() is None, image.said()
    body = json.dumps({"prompt": "10 green", "max_new_tokens": 4, "ignore_eos": True})
    ask = ["wget", "--quiet", "--output-document=-", f"--post-data={body}", f"http://127.0.0.1:{port}/generate"]
    code, answer = image.execute(service, *ask)
    assert code == 0, image.said()
    assert json.loads(answer)["version"] == "1"
    first_process(service).send_signal(signal.Signals[image.config["StopSignal"]])
    service.wait(60)


def test_the_image_trains_then_serves_the_champion_until_it_is_stopped(image: Image, text_file: Path) -> None:
    shutil.copy(text_file, image.root / "data" / "text.txt")
    (image.root / "data" / "text.txt").chmod(0o644)
    code, said = image.run("train", *SMALL, "--max-steps=20", "--data=/data/text.txt", "--name=first")
    assert code == 0, said
    assert "gpt version 1, now @champion" in said
    assert (image.root / "data/runs/first/package/model.safetensors").stat().st_uid == 1000

    kind, *check = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"

    serves_until_stopped(image, 9000, check, image.start(GPT_PORT="9000"), GPT_PORT="9000")
    serves_until_stopped(image, 9001, check, image.start("serve", "port=9001", "max_new_tokens=9"))
    assert list(image.root.glob("data/.cache/native/*.so"))  # so g++ built the kernel, and it answered

    other = image.start("sleep", "600")
    assert image.execute(other, *check)[0] == 0  # nothing to ask there
    other.kill()


def test_a_code_change_keeps_the_layer_of_packages(builder: Builder, tmp_path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in ("Dockerfile", ".dockerignore", *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tmp_path / name)
    before = builder.inspect()["rootfs"]["diff_ids"]
    with open(tmp_path / "gptcore" / "errors.py", "a") as code:
        code.write("# changed\n")
    builder.build(tmp_path)
    after = builder.inspect()["rootfs"]["diff_ids"]
    changed = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert changed
    assert min(changed) >= 3, "base, system packages and Python packages come first"
