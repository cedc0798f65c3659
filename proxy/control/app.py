"""The HTTP server of the control plane: one noun, one router, and a guard before all of them.

Names in paths are percent-encoded where they have to be and nowhere else; slashes in the names of models stay as they are
(`/models/org/name`). Errors are problems (RFC 9457) that also hold OpenAI's `error`.
"""

from __future__ import annotations

from fastapi import FastAPI

from proxy import __version__
from proxy.control import (
    admins,
    audit,
    backends,
    budgets,
    cache,
    errors,
    everyone,
    export,
    health,
    keys,
    models,
    openapi,
    prices,
    projects,
    requests,
    teams,
    usage,
    users,
)
from proxy.control.access import Guard
from proxy.control.callers import Callers
from proxy.control.state import State
from proxy.settings import address

ROUTERS = (
    health.router,
    teams.router,
    users.router,
    projects.router,
    keys.router,
    models.router,
    prices.router,
    backends.router,
    budgets.router,
    everyone.router,
    cache.router,
    admins.router,
    usage.router,
    requests.router,
    audit.router,
    export.router,
    openapi.router,
)


def create_app(state: State) -> FastAPI:
    # /docs and /redoc would load their page from somebody else's server
    app = FastAPI(
        title="Glasshouse control", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.control = state
    for router in ROUTERS:
        app.router.routes.extend(router.routes)  # flat, so that the guard finds what the router will find
    listen_host = address(state.settings.control.listen)[0]
    callers = Callers(state)
    app.add_middleware(Guard, routes=app.router.routes, listen_host=listen_host, identify=callers.identify)
    errors.install(app)
    return app
