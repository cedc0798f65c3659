"""3 admit: the right to run. What a key may do at all, and whether it, its user, project and team, and
everyone still have room for this request.

admission.py  the step: who has which limits, and a Permit for each request
standing.py   how one of them stands against its limits: buckets, budgets, counts; pure
estimate.py   what a request will take, guessed
permit.py     what one request holds, until its last byte
refusals.py   what callers are told
elsewhere.py  what other workers have spent, as the journal says
shared.py     the same limits, shared by several workers through Redis
batch.lua     what Redis does, in one round trip
"""

from proxy.admission.admission import Admission
from proxy.admission.permit import Permit

__all__ = ["Admission", "Permit"]
