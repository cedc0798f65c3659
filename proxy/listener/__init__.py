"""1 receive: client connections.

`server.py` has all of them, `connection.py` is one: it reads requests and keeps their order. `head.py` says what a request's
head must be, `compressed.py` unpacks bodies, `cors.py` and `probes.py` answer by themselves. `crowd.py` decides who may connect;
`secure.py` accepts where TLS is spoken, with the `certificate.py` of the moment."""
