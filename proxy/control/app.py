"""The HTTP server of the control plane: one noun, one router. It only tells; see the package's docstring for why."""

from __future__ import annotations

from fastapi import FastAPI

from proxy import __version__
from proxy.control import allowances, backends, errors, health, keys, models
from proxy.control.access import KnownHosts
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.control.publish import Publisher
from proxy.control.state import State
from proxy.settings import Settings, address

ROUTERS = (health.router, models.router, backends.router, keys.router, allowances.router)


def create_app(settings: Settings, inventory: Inventory, feed: CatalogueFeed, publisher: Publisher) -> FastAPI:
    # /docs and /redoc load their page from somebody else's server; /openapi.json is the same, without it
    app = FastAPI(title="Glasshouse control", version=__version__, docs_url=None, redoc_url=None)
    app.state.control = State(settings, inventory, feed, publisher)
    app.add_middleware(KnownHosts, listen_host=address(settings.control.listen)[0])
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
