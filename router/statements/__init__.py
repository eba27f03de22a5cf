"""SQL text → plan → decision: which shard, or shards, a statement goes to. Pure: no I/O, no clock, no state but caches.

    Plans(tables).of(text)                a text's plan, from its own cache, or that of its shape
    decide(planned, arguments, view)      where this execution of it goes

    restricted(planned, ranges)           the text of a read for a shard that holds rows of others meanwhile
    CopyKeys(spec).feed(data)             rows of COPY … FROM STDIN, each with its key

Never guess: what cannot be shown to be answered rightly by the shards it would go to is refused, with a hint.
"""

from router.statements.actions import (
    Action,
    Added,
    Arguments,
    CopySpec,
    Decision,
    Facts,
    Hint,
    Merge,
    OrderColumn,
    Part,
    Plan,
    Planned,
    Refusal,
    View,
)
from router.statements.copying import CopyKeys
from router.statements.deciding import decide, execute_arguments
from router.statements.lexer import Literal
from router.statements.plans import Plans
from router.statements.restricting import restricted
from router.statements.tables import Tables

__all__ = [
    "Action",
    "Added",
    "Arguments",
    "CopyKeys",
    "CopySpec",
    "Decision",
    "Facts",
    "Hint",
    "Literal",
    "Merge",
    "OrderColumn",
    "Part",
    "Plan",
    "Planned",
    "Plans",
    "Refusal",
    "Tables",
    "View",
    "decide",
    "execute_arguments",
    "restricted",
]
