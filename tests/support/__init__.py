"""What the tests stand on: doubles with a role, real sockets, no product code."""
