"""Is it right, and how fast: recorded numbers, invariants of an update, time."""
