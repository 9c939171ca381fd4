"""Tools: what serves several experiments, or looks at a trace or a result without asking a question of its own."""
