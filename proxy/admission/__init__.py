"""3 admit: the right to run. There are no limits yet; a Permit counts what is in flight and is held to the last byte."""

from __future__ import annotations

from types import TracebackType

from proxy.exchange import Exchange


class Admission:
    """Hands out permits. `in_flight` are the exchanges that hold one."""

    def __init__(self) -> None:
        self.in_flight: set[Exchange] = set()

    def admit(self, exchange: Exchange) -> Permit:
        record = exchange.record
        record.admitted_ns = record.authenticated_ns  # nothing was waited for
        return Permit(self.in_flight, exchange)


class Permit:
    """A context manager, so that it is let go on every way out."""

    __slots__ = ("_exchange", "_in_flight")

    def __init__(self, in_flight: set[Exchange], exchange: Exchange) -> None:
        self._in_flight = in_flight
        self._exchange = exchange
        in_flight.add(exchange)

    def __enter__(self) -> None:
        """It counts from its making."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._in_flight.discard(self._exchange)
