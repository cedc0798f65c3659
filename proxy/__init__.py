"""Glasshouse's data plane and control plane. Read `pipeline.py` first; `README.md` beside it tells the way of a request."""

__version__ = "0.1.0"
