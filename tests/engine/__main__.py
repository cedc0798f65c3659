"""Build what the engine tests need, if it isn't there: `python -m tests.engine`.

Ends with status 69 (EX_UNAVAILABLE) where vLLM can't be installed: no build for this machine or Python, or no index that has it.
"""

from __future__ import annotations

import os
import sys

from proxy.embedded.environments import InstallFailed
from tests.engine.environment import cache_directory, prepare


def main() -> int:
    try:
        prepared = prepare(lambda text: print(text, flush=True))
    except InstallFailed as failed:
        print(
            f"{failed}\n\n*** The engine tests can't run here: vLLM can't be installed in {cache_directory()}.", file=sys.stderr
        )
        return os.EX_UNAVAILABLE
    print(f"vLLM and its models are ready: {prepared.python}, {prepared.models}")
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
