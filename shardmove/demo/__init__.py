"""A small shop under load, the ledger that its writers keep outside the databases, and the checker that reads both."""
