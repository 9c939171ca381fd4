"""The scheduler: what runs in the next step. It knows requests and blocks, but no time."""
