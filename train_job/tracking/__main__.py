"""`python -m train_job.tracking`: prints the tracking URI or MLflow's pages, or delivers a spool."""

import argparse
import sys
from pathlib import Path

from gptcore.errors import FoundryError
from gptcore.home import default_tracking_uri
from train_job.tracking import pages
from train_job.tracking.client import check_server
from train_job.tracking.runs import experiment_pages
from train_job.tracking.spool import deliver


def main(arguments: list[str] | None = None) -> int:
    """Runs `uri`, `pages` or `deliver FOLDER`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train_job.tracking", description="Where runs are tracked.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("uri", help="print the tracking URI that runs use")
    page = commands.add_parser("pages", help="print the URLs of the experiments' pages")
    page.add_argument(
        "--ui",
        default=pages.UI,
        metavar="URL",
        help="URL of MLflow's UI, if runs are tracked in a database (%(default)s)",
    )
    command = commands.add_parser("deliver", help="send a spool's remaining points and files to MLflow")
    command.add_argument("folder", type=Path, help="the spool's folder")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "uri":
            check_server(default_tracking_uri())  # makes the folder of the embedded database
            print(default_tracking_uri())
        elif asked.command == "pages":
            for name, address in experiment_pages(default_tracking_uri(), asked.ui):
                print(f"{name}  {address}")
        else:
            print(f"delivered {deliver(asked.folder)} lines; nothing is left")
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
