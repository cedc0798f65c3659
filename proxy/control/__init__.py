"""The control plane: finds out what backends serve, follows the catalogue, publishes both as the workers' snapshot, and is where
the catalogue is looked at and changed.

    discovery.py    asking one backend what it serves
    issuers.py      fetching the public keys of those whose tokens are taken
    inventory.py    what is known of all backends and models; decides, asks nobody
    catalogue.py    what holds: the file's word over the database's
    feed.py         following the database
    publish.py      all of it → the snapshot file, when it has something to say
    server.py       the loops that drive these, beside the HTTP servers
    database.py     the database for an event loop

The HTTP API:

    app.py          everything put together: the guard, then one noun, one router
    access.py       the guard: who may do what; callers.py: who it is; local.py: the Unix socket
    resource.py     what most nouns have in common: list, one, PUT, PATCH, DELETE
    bodies.py       what is sent; answers.py and errors.py: what is answered; writes.py: what is changed, once and signed
    openapi.py      what it says of itself
    teams.py, users.py, projects.py, keys.py, models.py, prices.py, backends.py, budgets.py, everyone.py, admins.py,
    usage.py, requests.py, audit.py, export.py, health.py       a noun each

Functions of a noun that take a `Connection` first run in one transaction, in a thread or as asyncpg wants it: they wait for
nothing but the database. `spending.py` sums up what is used of budgets, `forget.py` deletes what one person said.
"""
