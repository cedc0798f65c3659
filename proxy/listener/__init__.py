"""1 receive: client connections. `connection.py` parses requests and keeps their order, `reply.py` writes answers and holds back
what a client must not have before the record is written, `probes.py` answers `/health` and `/ready`."""
