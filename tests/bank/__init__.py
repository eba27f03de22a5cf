"""The bank: clients behind two routers, ranges that move all the time, routers that die, and money that must not.

python -m tests.bank --minutes 5        (`--help` for more)

    ground      servers, the bank's tables, the configuration, the owner of each tenant
    sessions    one connection of a client, by one of three drivers' ways of speaking
    clients     what a client does, what it is told, and its ledger (`shardmove/demo/ledger.py`)
    mover       split, cutover, revert, merge, complete, roll back, move: in a loop, by the coordinator's own functions
    strikes     routers killed and started again, in turn
    verdict     the accounts, read from the shards, held against the ledgers
    play        all of it together; the tables at the end

No money comes or goes: every tenant's sum is what it was at first, at every moment and for every reader. Each transfer
is a row of its own, so the balance of every account also follows from the transfers that are there.
"""
