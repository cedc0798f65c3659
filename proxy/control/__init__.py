"""The control plane: finds out what backends serve, follows the catalogue, and publishes both as the workers' snapshot.

    discovery.py    asking one backend what it serves (the only client code here)
    inventory.py    what is known of all backends and models; decides, asks nobody
    feed.py         following the database's keys
    publish.py      inventory + keys → the snapshot file, when it has something to say
    server.py       the loops that drive these, beside an HTTP server
    app.py          the HTTP server: one noun, one router (health, models, backends, keys)
    access.py       whom it answers; errors.py: in which shape

It answers questions and changes nothing: **there is no authentication yet, so nothing can be created or revoked over HTTP.** Keys
are made by `glasshouse keys`. Listening on anything but loopback shows the names of keys and models to whoever can connect.
"""
