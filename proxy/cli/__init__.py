"""The command: `glasshouse up | reload | keys | usage | check`. One file a command; what they share: `config.py`, `report.py`.

YAML and click are used here and nowhere else.
"""

from __future__ import annotations

import click

from proxy import __version__
from proxy.cli.check import check
from proxy.cli.keys import keys
from proxy.cli.reload import reload
from proxy.cli.up import up
from proxy.cli.usage import usage


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glasshouse")
def main() -> None:
    """Glasshouse: the observability-first LLM proxy for people who run their own vLLM."""


main.add_command(up)
main.add_command(reload)
main.add_command(keys)
main.add_command(usage)
main.add_command(check)
