"""The control API in this process, for when none runs: on the same database, with the same checks and the same audit log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import click
import httpx2

from proxy.control.app import create_app
from proxy.control.local import Local
from proxy.control.server import Control
from proxy.settings import Settings
from proxy.store import StoreError, open_database


@contextmanager
def local_transport(settings: Settings) -> Iterator[httpx2.BaseTransport]:
    """Requests go straight to the application. Brings the database up to date, and makes the state directory if it lies there,
    for its owner only. Raises click.ClickException: it can't be used."""
    try:
        if not settings.database:
            settings.state_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        open_database(settings.database_url).dispose()
    except (OSError, StoreError) as error:
        raise click.ClickException(str(error)) from None
    with asyncio.Runner() as runner:
        state = Control.of(settings).state
        try:
            yield _Straight(runner, httpx2.ASGITransport(Local(create_app(state))))
        finally:
            state.feed.close()
            runner.run(state.database.close())


class _Straight(httpx2.BaseTransport):
    """An ASGI application, asked from where there is no event loop."""

    def __init__(self, runner: asyncio.Runner, application: httpx2.ASGITransport) -> None:
        self._runner = runner
        self._application = application

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self._runner.run(self._ask(request))

    async def _ask(self, request: httpx2.Request) -> httpx2.Response:
        answer = await self._application.handle_async_request(request)
        return httpx2.Response(answer.status_code, headers=answer.headers, content=await answer.aread())
