"""The durable record, in one PostgreSQL database: routes, plans, moves, leases, cutover attempts, events.

`store.Catalog` is the way in. Every effect is one call of one function of the schema `shardmove_catalog`, thus one
message and one transaction: a process that dies leaves the effect whole or not at all.
"""
