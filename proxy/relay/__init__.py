"""6 relay: bytes to an engine and back. `relay.py` chooses and retries, `call.py` is one answer, `connection.py` one connection,
`pool.py` a backend's connections; `probe.py` and `embed.py` are the proxy's own requests. Chunks move in callbacks: no task
switch, no queue, no JSON per chunk."""

from proxy.relay.embed import Embedder
from proxy.relay.relay import Fallbacks, Relay

__all__ = ["Embedder", "Fallbacks", "Relay"]
