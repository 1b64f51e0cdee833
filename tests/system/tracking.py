"""MLflow's server in its own process, for tests on real clusters."""

import os
import signal
import subprocess
from pathlib import Path

from tests.ports import free_port
from tests.system.conftest import BIN
from tests.waiting import await_server, is_up


class TrackingServer:
    """A real `mlflow server` that can be killed and started again on the same port."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder, self.address, self.port = folder, address, free_port()
        self.uri = f"http://{address}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", "artifacts"]
        command = [BIN / "mlflow", "server", f"--host={self.address}", f"--port={self.port}", "--workers=1", *store]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def await_answer(self) -> None:
        assert self.process
        await_server(self.process, lambda: is_up(f"{self.uri}/health"), self.folder / "server.log", 300)
