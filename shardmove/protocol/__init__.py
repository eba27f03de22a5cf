"""What any party may run against the shards of a move: triggers, journal, catch-up, fence, ownership after a crash."""
