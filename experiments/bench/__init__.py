"""Head-to-heads and timings; each is run by itself, on a quiet machine."""
