"""The allocator: a paged KV cache's block manager, without a clock, a GPU or a request in it."""
