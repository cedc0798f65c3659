"""The telemetry plane: one process per host that follows the workers' journals and projects every record.

    __main__.py      `python -m collectors --settings FILE`
    process.py       the process: what runs in it, in which order it stops
    claim.py         one collector per state directory, and its identity
    exposition.py    `/metrics` over HTTP
    records/         journal → sinks: ledger, metrics, spans

Nothing here is on a request's path. With this process down nothing is lost: records wait in the journal.
"""
