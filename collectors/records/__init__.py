"""From the journal to whoever wants to know: every sink sees every record, each at a pace of its own.

sinks.py            what a sink is, and the table of them
follow.py           one thread a sink: poll the journal, hand it on, back off
state.py            a sink's state in a file, replaced atomically

ledger.py           rows in the database, exactly once
spent.py            what the rows cost, summed by budget window; no I/O
metrics.py          the table of metrics: add one here
series.py           counters and histograms as plain lists; no clock, no I/O
prometheus.py       the metrics' sink: counts records, keeps its state, speaks to prometheus_client
spans.py            Record → OpenTelemetry spans; pure
content/            prompts and answers out of raw bodies, one file an API; pure
bounded.py          what was said, in as many characters as a trace may hold; pure
captured.py         looks captured bodies up in their segments
phoenix.py          the spans' sink: a bounded queue of traces, and the thread that sends them
phoenix_prices.py   our prices in Phoenix's table, so that its costs are the ledger's
"""
