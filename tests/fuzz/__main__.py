"""Coverage-guided fuzzing of what reads bytes from outside: `python -m tests.fuzz TARGET`, with atheris (libFuzzer).

Starts from the corpus in tests/fuzz/corpus and from right inputs, and ends after `--executions` or at the first input
that crashes, hangs, takes more than the memory allowed, opens a file outside its folder or unpickles something. That
input is saved beside the corpus; `make test` replays all of them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"
LIMITS = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=100000", "-print_final_stats=1"]
"""Seconds and MiB of a single input; the longest input, in bytes."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    names = ("package", "checkpoint", "conversations", "texts", "settings", "template", "body")
    parser.add_argument("target", choices=names)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with atheris.instrument_imports(include=["gptcore", "train_job", "serve_app"], enable_loader_override=False):
        from tests.fuzz.guard import watched
        from tests.fuzz.targets import TARGETS
    target = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder, found = Path(scratch) / "work", Path(scratch) / "found"
        folder.mkdir()
        found.mkdir()
        for number, seed in enumerate(target.seeds(folder)):
            (found / f"seed-{number}").write_bytes(seed)
            assert target(seed, folder), "a right input was refused"

        def once(data: bytes) -> None:
            with watched(folder):
                target(data, folder)

        kept = CORPUS / arguments.target
        kept.mkdir(parents=True, exist_ok=True)
        ends = [f"-runs={arguments.executions}", f"-seed={arguments.seed}", f"-artifact_prefix={kept}/"]
        atheris.Setup([sys.argv[0], *LIMITS, *ends, str(found), str(kept)], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
