"""`python -m tests.bench`: Glasshouse beside nginx and nothing, in one run.

Another gateway: `--also 'envoy=envoy -c {folder}/envoy.yaml --base-id {port}'`; {port} is where it is to listen,
{upstream_port} where the upstream does, {folder} a temporary folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from tests.bench.measure import QUICK, Plan, measure
from tests.bench.report import as_json, as_table
from tests.bench.targets import Command, Direct, Glasshouse, Nginx, Target


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, less of everything")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--shared", action="store_true", help="all on all CPUs, not each target on one of its own")
    parser.add_argument("--only", action="append", help="of direct, nginx and glasshouse measure only these")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=COMMAND", help="another gateway")
    parser.add_argument("--key", help="the API key that the other gateways ask for")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    plan = QUICK if options.quick else Plan()
    plan = msgspec.structs.replace(plan, rounds=options.rounds or plan.rounds, pinned=not options.shared)
    others = [Command(name, command, options.key) for name, _, command in (text.partition("=") for text in options.also)]
    targets = chosen(options.only, others)
    try:
        results = measure(targets, plan)
    finally:
        for target in targets:
            target.stop()
    print(as_table(results, plan))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(as_json(results, plan))))


def chosen(only: list[str] | None, others: list[Command]) -> list[Target]:
    makers: list[type[Direct | Nginx | Glasshouse]] = [Direct, Glasshouse]
    if Nginx.installed():
        makers.insert(1, Nginx)
    return [*(make() for make in makers if only is None or make.name in only), *others]


if __name__ == "__main__":
    main()
