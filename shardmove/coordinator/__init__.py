"""A move's states, one function each; planner, preflight, cutover, rollback, complete; attending moves."""
