"""Signals to the driver: the first waits for the current work, the second ends the process at once."""

import subprocess
import sys

import pytest

DRIVER = """
import signal, sys
from train_job.session.stop import StopSignals

def heard():
    print("heard", flush=True)

with StopSignals(heard) as stops:
    stops.check(last="late" in sys.argv)
    print("working", flush=True)
    sys.stdin.readline()
    print("done with that", flush=True)
    try:
        stops.check()
    except KeyboardInterrupt as stop:
        sys.exit(128 + stop.args[0])
"""


def driver(*arguments: str) -> subprocess.Popen[str]:
    command = ["env", "--default-signal=HUP", sys.executable, "-c", DRIVER, *arguments]  # nohup may run the tests
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("number", [2, 15])
def test_a_stop_is_confirmed_at_once_and_waits_for_the_current_work(number: int) -> None:
    process = driver()
    process.send_signal(number)
    assert process.stdout
    assert process.stdout.readline() == "heard\n"
    assert process.communicate("go on\n")[0] == "done with that\n"
    assert process.returncode == 128 + number


def test_a_second_signal_ends_the_process_at_once() -> None:
    process = driver()
    process.send_signal(2)
    assert process.stdout
    assert process.stdout.readline() == "heard\n"
    process.send_signal(15)
    assert process.wait(10) == 143
    process.communicate()


def test_a_late_stop_changes_nothing() -> None:
    process = driver("late")
    process.send_signal(2)
    assert process.communicate("go on\n")[0] == "done with that\n"
    assert process.returncode == 0


def test_closing_the_terminal_stops_the_run_once() -> None:
    process = driver()
    process.send_signal(1)
    assert process.stdout
    assert process.stdout.readline() == "heard\n"
    process.send_signal(1)  # the kernel's and the shell's
    assert process.communicate("go on\n")[0] == "done with that\n"
    assert process.returncode == 129


def test_closing_the_terminal_does_not_stop_a_run_under_nohup() -> None:
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    process.send_signal(1)
    assert process.communicate("go on\n")[0] == "done with that\n"
    assert process.returncode == 0
