"""What the engines say of their own load: asked once a second, written to the file `engines` for the workers, and told on
`/metrics`.

`kinds.py` says which servers tell their load and who reads what they tell (`vllm.py`), `http.py` asks, `totals.py` counts across
restarts, `engine.py` is one of them, `watch.py` all. Nothing here is on a request's path, and nothing else waits for it.
"""

from collectors.engines.watch import EngineWatch

__all__ = ["EngineWatch"]
