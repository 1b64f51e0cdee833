"""What a sweep prints while its trials run, and which weights it drops."""

import shutil
from collections.abc import Sequence

from gptcore.units import duration
from train_job.session.console import Console
from train_job.session.history import read_history
from train_job.sweeps.space import shown
from train_job.sweeps.trials import Ending, Trial, ranked
from train_job.training.storage import drop


class SweepProgress:
    """Prints each trial once it has ended, with a live line for the others; keeps the weights of the best `keep`.

    Trials that have ended already were printed by an earlier run of the sweep.
    """

    def __init__(self, trials: Sequence[Trial], keep: int, console: Console) -> None:
        self._trials, self._keep, self._console = trials, keep, console
        self._printed = {trial.number for trial in trials if trial.ending()}
        self._dropped: set[int] = set()

    def show(self) -> None:
        """Prints trials that have ended, updates the live line, and drops weights that are not kept."""
        ended = ranked(self._trials)
        for trial, ending in sorted(ended, key=lambda pair: pair[0].number):
            if trial.number not in self._printed:
                self._printed.add(trial.number)
                self._print(trial, ending, leads=(trial, ending) == ended[0])
        for place, (trial, ending) in enumerate(ended):
            if place >= self._keep or ending.status == "FAILED":
                self._drop(trial)
        self._console.live(self.status())

    def status(self) -> str:
        """One line: how many trials have ended, where the others are, and the best."""
        ended = ranked(self._trials)
        parts = [f"{len(ended)} of {len(self._trials)} trials"]
        for trial in self._trials:
            if not trial.ending() and (rows := read_history(trial.folder / "history.jsonl")):
                bits = f", {trial.best()['bits_per_byte']:.3f} bits/byte" if trial.evaluations() else ""
                parts.append(f"{trial.number:02} step {rows[-1]['step']:.0f}{bits}")
        if ended and ended[0][1].status == "FINISHED":
            parts.append(f"best {ended[0][0].best()['bits_per_byte']:.4f} ({ended[0][0].number:02})")
        return " | ".join(parts)

    def _print(self, trial: Trial, ending: Ending, leads: bool) -> None:
        finished = ending.status == "FINISHED"
        bits = f"{trial.best()['bits_per_byte']:.4f} bits/byte, " if finished else ""
        best = "  best so far" if leads and finished else ""
        took = duration(ending.seconds)
        self._console.say(f"{trial.name}  {bits}{ending}, {took} | {shown(trial.values)}{best}")

    def _drop(self, trial: Trial) -> None:
        """Removes the trial's weights; its metrics stay."""
        if trial.number not in self._dropped:
            self._dropped.add(trial.number)
            shutil.rmtree(trial.folder / "package", ignore_errors=True)
            drop(trial.config, say=self._console.say)
