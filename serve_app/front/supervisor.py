"""Supervises HAProxy: the program that Ray's manager starts instead of HAProxy.

It takes HAProxy's arguments from Ray, starts HAProxy with the configuration of `haproxy.amend_config`, and restarts it
within a tenth of a second when it dies. Ray identifies its HAProxy by the process id that the command socket reports,
so the supervisor owns that socket and reports its own id. A new supervisor takes the port over from the previous one.
A supervisor outlives a killed manager, until there is a new one or Ray ends.
"""

import argparse
import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from serve_app.front import haproxy

BACK_SECONDS = 0.1
"""Delay before a restart; doubled while HAProxy dies within STEADY_SECONDS."""
MOST_BACK_SECONDS = 2.0
STEADY_SECONDS = 5.0
TAKE_OVER_SECONDS = 30.0
ORPHAN_SECONDS = 60.0
"""How long a supervisor keeps running without a manager; Ray's controller starts a new one meanwhile."""
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """One of Ray's HAProxy configurations, and the HAProxy process that runs it."""

    def __init__(self, arguments: list[str]) -> None:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("-f", type=Path)
        parser.add_argument("-sf", type=int, nargs="*", default=[])
        given, _ = parser.parse_known_args(arguments)
        self.config: Path = given.f
        self.flags = [flag for flag in arguments if flag in ("-db", "-dR")]
        self.rays: list[int] = given.sf
        text = self.config.read_text()
        self.socket = haproxy.command_socket(text)
        self.own_socket = self._of(os.getpid(), "s")
        self.own_config = self._of(os.getpid(), "cfg")
        self.fresh = self._of(os.getpid(), "new")
        unavailable = self.config.with_name("unavailable.http")
        unavailable.write_text(haproxy.error_page(), newline="")
        self.before = _port_owner(self.config)
        amended = haproxy.amend_config(text, self.own_socket, unavailable)
        if self.before and not self.rays and not haproxy.has_backends(amended):
            # The manager has just replaced one that died and does not know the replicas yet.
            with suppress(OSError):
                known = self._of(self.before, "cfg").read_text()
                amended = known.replace(str(self._of(self.before, "s")), str(self.own_socket))
        self.own_config.write_text(amended)
        self.binary = haproxy.binary()
        self.child: asyncio.subprocess.Process | None = None
        self.leaving = False

    async def run(self) -> int:
        """Run HAProxy until asked to stop; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            loop.add_signal_handler(number, self._leave, number)
        await self._start(self.before)
        if not await self._answers():
            return self.child.returncode or 1 if self.child else 1
        _take_port(self.config)
        server = await asyncio.start_unix_server(self._command, str(self.fresh))
        os.replace(self.fresh, self.socket)
        for supervisor in {*self.rays, *([self.before] if self.before else [])}:  # the signal Ray uses for a soft stop
            _signal(supervisor, signal.SIGUSR1, self.config)
        watching = asyncio.create_task(self._watch_ray())
        code = await self._keep()
        watching.cancel()
        server.close()
        return code

    async def _start(self, before: int | None = None) -> None:
        """Start HAProxy; it takes the listening sockets over from the supervisor `before`, if there is one."""
        taking = ["-x", str(self._of(before, "s"))] if before else []
        command = [self.binary, *self.flags, "-f", str(self.own_config), *taking]
        self.child = await asyncio.create_subprocess_exec(*command, preexec_fn=_die_with_parent)

    async def _answers(self) -> bool:
        """Wait until HAProxy accepts commands; False if it exits instead, after printing why."""
        deadline = time.monotonic() + TAKE_OVER_SECONDS
        while self.child and self.child.returncode is None and time.monotonic() < deadline:
            with suppress(OSError):
                if await self._ask(b"show info\n"):
                    return True
            await asyncio.sleep(0.02)
        return False

    async def _keep(self) -> int:
        """Restart HAProxy whenever it dies, until the supervisor is told to stop; return the last exit code."""
        pause = BACK_SECONDS
        while True:
            assert self.child
            begun = time.monotonic()
            code = await self.child.wait()
            if self.leaving:
                return max(code, 0)
            pause = BACK_SECONDS if time.monotonic() - begun > STEADY_SECONDS else min(2 * pause, MOST_BACK_SECONDS)
            print(f"HAProxy exited with {code}; restarting it", file=sys.stderr, flush=True)
            await asyncio.sleep(pause)
            await self._start()

    def _leave(self, number: int) -> None:
        """Pass a stop signal on: with SIGUSR1, HAProxy finishes its requests; with SIGTERM, it does not."""
        self.leaving = True
        if self.child and self.child.returncode is None:
            self.child.send_signal(number)

    async def _command(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass Ray's command on to HAProxy; in the reply, replace HAProxy's process id by the supervisor's."""
        with suppress(OSError):
            answer = await self._ask(await reader.readline())
            writer.write(re.sub(rb"(?m)^Pid: \d+", b"Pid: %d" % os.getpid(), answer))
            await writer.drain()
        writer.close()

    async def _ask(self, command: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self.own_socket))
        try:
            writer.write(command)
            return await reader.read()
        finally:
            writer.close()

    def _of(self, supervisor: int, kind: str) -> Path:
        """A file of that supervisor: HAProxy's configuration (cfg), its command socket (s), or a new socket (new)."""
        return self.socket.with_name(f"{supervisor}.{kind}")

    async def _watch_ray(self) -> None:
        """Stop when Ray ends. If only the manager died, wait for the supervisor of the next manager."""
        manager = os.getppid()
        node = os.pidfd_open(_parent(manager)) if hasattr(os, "pidfd_open") else None
        loop, gone, orphaned = asyncio.get_running_loop(), asyncio.Event(), 0.0
        if node is not None:
            loop.add_reader(node, gone.set)
        while not gone.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(gone.wait(), 0.5)
            if os.getppid() != manager:
                orphaned = orphaned or time.monotonic()
                if time.monotonic() - orphaned > ORPHAN_SECONDS:
                    break
        self._leave(signal.SIGTERM)


def _die_with_parent() -> None:
    """In the child process: die with the supervisor, since Ray stops HAProxy by killing that."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _take_port(config: Path) -> None:
    """Record that this supervisor has the port of `config`."""
    note = config.with_name(f"{os.getpid()}.note")
    note.write_text(str(os.getpid()))
    os.replace(note, config.with_name("supervisor"))


def _port_owner(config: Path) -> int | None:
    """The running supervisor that has the port now, with or without a manager."""
    with suppress(OSError, ValueError):
        supervisor = int(config.with_name("supervisor").read_text())
        return supervisor if _supervises(supervisor, config) else None
    return None


def _supervises(pid: int, config: Path) -> bool:
    """Whether that process is a supervisor of `config`, and not another process that reuses the id."""
    try:
        return os.fsencode(config) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _signal(pid: int, number: int, config: Path) -> None:
    if pid != os.getpid() and _supervises(pid, config):
        with suppress(OSError):
            os.kill(pid, number)


def _parent(pid: int) -> int:
    """The parent of a process, from /proc."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def main() -> int:
    """The entry point that Ray starts."""
    arguments = sys.argv[1:]
    if "-f" not in arguments:  # such as -v
        return subprocess.call([haproxy.binary(), *arguments])
    os.setsid()  # neither Ctrl-C in the terminal nor Ray's cleanup after a dead manager should reach us
    supervisor = Supervisor(arguments)
    try:
        return asyncio.run(supervisor.run())
    finally:
        for path in (supervisor.own_socket, supervisor.own_config, supervisor.fresh):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
