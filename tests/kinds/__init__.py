"""The cases of `tests/test_kinds.py`, a module a group; docs/kinds.md is made from them."""

from __future__ import annotations

from typing import Final

from tests.kinds.columns import COLUMNS
from tests.kinds.constraints import CONSTRAINTS
from tests.kinds.keys import BY_HASH, KEYS
from tests.kinds.keysets import KEYSETS, NO_KEY
from tests.kinds.names import NAMES
from tests.kinds.partitions import PARTITIONS
from tests.kinds.servers import SERVERS
from tests.kinds.values import TYPES

CASES: Final = (
    *KEYS, *BY_HASH, *KEYSETS, *NO_KEY, *PARTITIONS, *CONSTRAINTS, *COLUMNS, *TYPES, *NAMES, *SERVERS,
)  # fmt: skip
