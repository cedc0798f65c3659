"""Answers that are given again, instead of being made again.

`cache.py` is the step of the pipeline: it says what a request may get, has it given or lets it be made. `key.py` says which
requests are the same; `entry.py` is an answer that was kept, `sealed.py` one that leaves this process; `memory.py` and `redis.py`
are where, and `sweep.py` deletes there; `forms/` make a stream of an answer in one piece, and the other way round; `flight.py`
has those who want the same at the same time share one answer. `semantic.py` finds questions that mean the same, `vectors.py`
those of other workers.

Who may share answers is part of the key, which a secret of this installation makes: nobody can guess one, or tell from one what
was asked. A store that is slow, gone or full of rubbish is a store without answers.
"""
