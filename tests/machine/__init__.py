"""The engine as a state machine: stories of steps in any order, each checked against what the application was told."""
