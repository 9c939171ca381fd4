"""Several replicas of one engine behind a router: they share a trace, and each has a cache of its own."""
