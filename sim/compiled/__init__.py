"""The inner loops of allocator and simulator, compiled: how they are made, found, and chosen."""
