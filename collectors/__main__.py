"""`python -m collectors --settings FILE`: follow this host's journals until SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from collectors.claim import InUse
from collectors.process import Collector
from proxy import logs
from proxy.settings import Settings, SettingsError

log = logging.getLogger("collectors")

NOISY = ("opentelemetry", "urllib3", "alembic")
"""They report what we report ourselves, once, with its consequence."""

NICENESS = 10
"""Whoever carries tokens goes first: what is recorded can wait, it is in the journal."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="collectors", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="effective settings, as the supervisor wrote them")
    arguments = parser.parse_args()
    os.umask(0o077)  # who asked what, and what it cost: nobody else's business
    logs.setup("collector")
    os.nice(NICENESS)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        collector = Collector(Settings.read(arguments.settings))
    except (InUse, OSError, SettingsError) as error:
        log.critical("can't start", extra={"error": str(error)})
        return 1
    collector.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
