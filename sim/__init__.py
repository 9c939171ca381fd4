"""Replay request traces through the paged allocator and measure what becomes of them."""
