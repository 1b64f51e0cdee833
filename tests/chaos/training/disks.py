"""Disks, stores and files of a run that fill up, fail, are slow or are changed."""

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptcore.errors import CheckpointError
from tests.chaos.disks import fill, mount, mounted_disk, tmpfs
from tests.chaos.fault import Result
from tests.chaos.gate import Gate, every, status
from tests.chaos.training.site import END_SECONDS, Run, Site, ended, finished, go_on
from tests.deploy.conftest import s3_server
from tests.waiting import eventually
from train_job.training.checkpoint import verified

BUCKET = "chaos"
KEYS = {"AWS_ACCESS_KEY_ID": "chaos", "AWS_SECRET_ACCESS_KEY": "chaos-secret"}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


def damaged_checkpoints(site: Site, rng: random.Random) -> Result:
    """Every file of a checkpoint, cut or with one bit changed, in each of ten regions."""
    run = site.reference()
    checkpoint = max(run.job.run_dir.glob("checkpoint_*/"), key=lambda folder: folder.stat().st_mtime)
    result = Result(unit="reads")
    for file in sorted(checkpoint.iterdir()):
        for region in range(10):
            for cut in (False, True):
                harmed = Path(shutil.copytree(checkpoint, site.scratch / "harmed"))
                content = bytearray((harmed / file.name).read_bytes())
                at = min(len(content) - 1, (region * len(content) + rng.randrange(len(content))) // 10)
                if cut:
                    del content[at:]
                else:
                    content[at] ^= 1 << rng.randrange(8)
                (harmed / file.name).write_bytes(content)
                result.times += 1
                result.touched += 1
                try:
                    verified(harmed)
                    result.lost += 1
                    result.expect(False, f"{file.name} with byte {at} {'cut off' if cut else 'changed'} was taken")
                except CheckpointError:
                    pass
                finally:
                    shutil.rmtree(harmed)
    return result


def full_disk(site: Site, rng: random.Random) -> Result:
    """A disk that fills up at different moments of a run, and has space again."""

    @contextlib.contextmanager
    def full(disk: Path, run: Run) -> Iterator[None]:
        ballast, leave = disk / "ballast", rng.choice((0, 1_000, 100_000, 1_000_000))
        deadline = time.monotonic() + END_SECONDS
        while not run.ended and time.monotonic() < deadline:
            fill(ballast, leave)  # again, as deleted checkpoints leave room
            time.sleep(0.05)
        yield
        ballast.unlink()

    return failing_disk(site, rng, full, "is full", 3, *tmpfs("64m"))


def read_only_disk(site: Site, rng: random.Random) -> Result:
    """A disk that has become read-only, also for files that are open, as one does that has errors."""

    @contextlib.contextmanager
    def read_only(disk: Path, run: Run) -> Iterator[None]:
        mount(disk, "-o", "remount,abort")
        yield
        subprocess.run(["umount", disk], check=True)
        subprocess.run(["e2fsck", "-y", image], capture_output=True)
        mount(disk, "-o", "loop", image)

    image = site.scratch / "disk.img"
    with image.open("wb") as file:
        file.truncate(128 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    return failing_disk(site, rng, read_only, "ead-only", 2, "-o", "loop", image)


def failing_disk(
    site: Site, rng: random.Random, fails: Callable[[Path, Run], Any], says: str, times: int, *source: str | Path
) -> Result:
    """Makes a run's disk fail so many times, each time until the run has ended, and resumes it."""
    reference, name, result = site.reference(), site.name("disk"), Result(unit="steps")
    disk = site.home / "runs" / name
    with mounted_disk(disk, *source) as mounted:
        if not mounted:
            result.expect(False, "not tried: it takes root to mount a small disk")
            return result
        run = site.launch(name)
        for _ in range(times):
            run.await_step(run.step + rng.randint(5, 60))
            with fails(disk, run):
                _, output = ended(result, run, f"the disk {says}")
                result.expect(says in output, f"it does not say that the disk {says}: {output[-300:]}")
            run = go_on(site, run, result)
        return finished(result, run, reference)


def slow_disk(site: Site, rng: random.Random) -> Result:
    """Every fsync and every renaming takes long."""
    reference, result = site.reference(), Result(times=1, unit="steps")
    with site.disturbed(write_seconds=0.2):
        run = site.launch(site.name("slow"))
        finished(result, run, reference)
    result.expect(site.was_disturbed("write_seconds"), "no write was slow")
    return result


def store_failing(site: Site, rng: random.Random) -> Result:
    """Checkpoints in a bucket, whose store says SlowDown to every third call; the worker is killed, too."""
    reference, result = site.reference(), Result(unit="steps")
    with s3_server(BUCKET, KEYS) as store, Gate(int(store.url.rpartition(":")[2])) as gate:
        env = store.env | {"AWS_ENDPOINT_URL": gate.uri}
        site.new_cluster(**env)
        with gate.failing(every(3, status(503, SLOW_DOWN, "application/xml"))):
            run = site.launch(site.name("stored"), f"--storage-path=s3://{BUCKET}/runs", **env)
            run.await_step(rng.randint(25, 100))
            before, moment = run.step, time.monotonic()
            site.kill_workers(result)
            run.await_step(before + 1)
            result.recovery.append(time.monotonic() - moment)
            finished(result, run, reference)
        site.new_cluster()
        result.times = gate.failed // 3
        result.expect(gate.failed > 30, f"only {gate.failed} calls were made")
    return result


def changed_tokens(site: Site, rng: random.Random) -> Result:
    """The files of tokens are changed while a run reads them, and deleted before its worker is killed."""
    reference, name, result = site.reference(), site.name("data"), Result(unit="steps")
    run = site.launch(name)
    for harm in rng.sample(("changed", "changed", "deleted", "deleted"), 4):
        run.await_step(run.step + rng.randint(5, 60))
        shards = list((site.home / ".cache" / "shards").glob("*.bin"))
        result.expect(bool(shards), "no files of tokens were found")
        before, moment = run.step, time.monotonic()
        for shard in shards:
            if harm == "deleted":
                shard.unlink()
            else:
                with shard.open("r+b") as file:  # in place: the run has it mapped
                    file.seek(rng.randrange(shard.stat().st_size))
                    file.write(b"\x00")
        if harm == "deleted":
            site.kill_workers(result)
            run.await_step(before + 1)
        else:
            eventually(lambda run=run: "was changed while it was in use" in run.output, "the run has noticed", 60)
            run.await_step(run.step + 1)
        result.recovery.append(time.monotonic() - moment)
        result.times += 1
    return finished(result, run, reference)


def changed_text(site: Site, rng: random.Random) -> Result:
    """A line is added to the text while the run is stopped. It is taken away again after the refusal."""
    reference, result, before = site.reference(), Result(times=1, unit="steps"), site.text.read_bytes()
    run = site.launch(site.name("text"))
    run.await_step(rng.randint(25, 100))
    run.kill()
    try:
        site.text.write_bytes(before + b"a line that was not there\n")
        again = site.resume(run)
        code, output = again.finish()
        result.expect(code == 2, f"a resume with another text ended with {code}: {output[-300:]}")
        result.expect(site.text.name in output, f"the error does not name the text: {output[-300:]}")
    finally:
        site.text.write_bytes(before)
    return finished(result, go_on(site, run, result), reference)
