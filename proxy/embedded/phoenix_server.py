"""Phoenix, with its gRPC receiver on the same host as the rest of it. A script for Phoenix's environment.

Phoenix 20.26.1 opens its OTLP/gRPC port on `[::]`, that is for the whole network, whatever PHOENIX_HOST says, and has no
setting to move it or to switch it off; `--grpc-port 0` merely makes it any port. The address is replaced on its way into gRPC
instead, before Phoenix is imported. Should a later version open the port some other way, `tests/server/test_embedded.py` sees
it.
"""

import os
from typing import Any

import grpc.aio  # type: ignore[import-not-found,import-untyped,unused-ignore]


def bind_grpc_to(host: str) -> None:
    make = grpc.aio.server

    def server(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        listen = made.add_insecure_port
        made.add_insecure_port = lambda address: listen(f"{host}:{address.rpartition(':')[2]}")
        return made

    grpc.aio.server = server


def main() -> None:
    os.umask(0o077)  # its database holds what people asked and were told
    bind_grpc_to(os.environ["PHOENIX_HOST"])
    from phoenix.server.main import main as phoenix_main  # type: ignore[import-not-found,unused-ignore]

    phoenix_main()


if __name__ == "__main__":
    main()
