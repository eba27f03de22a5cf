"""The crash campaign: whole moves of real processes between real servers, struck at every control point.

A *cell* is a control point, who reaches it, and a victim. A *run* is one move with one strike in it, from its plan to
its end, under writers that keep a ledger of their own (`shardmove/demo/ledger.py`). `python -m tests.campaign --help`.

    scenarios   the moves: which commands, one after the other; which points they reach is found by recording them
    strikes     the victims, and one run's spec as a word that replays it
    ground      servers, templates of their databases, and the databases of one run
    zygote      a warm process that forks the commands; `commands` is its client, `worker` what their workers run
    relay       what cuts and freezes TCP connections
    stale       a client that reads no routes
    outside     what is left on servers, told by their own catalogs
    play        one run
    driver      many of them; `report` writes docs/reliability.md
    twins       mechanisms to be switched off, to see that the damage is seen
"""
