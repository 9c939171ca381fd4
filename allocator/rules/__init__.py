"""What the state machines of `allocator.fuzz` do, a concern a module. Needs hypothesis."""
