"""The bank, for as long as you like.

python -m tests.bank --minutes 5                                   prints the seed and the tables; 1 where it failed
python -m tests.bank --minutes 5 --seed 7 --pooling transaction
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from shardmove.postgres.embedded import Cluster
from tests.bank.ground import ROUTER, SHARDS, Ground, create_databases
from tests.bank.play import CLIENTS, play
from tests.support.router import Routers

SETTINGS: Final = {"fsync": "off", "max_connections": "300"}


def main() -> int:
    asked = _asked()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us, nothing of ours stays
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="bank-"))
    settings: dict[str, Any] = {"pooling": asked.pooling, "processes": asked.processes, **ROUTER}
    with Cluster(("cat", *SHARDS), settings=SETTINGS) as cluster, Routers(directory) as routers:
        create_databases({name: cluster[name].dsn for name in ("cat", *SHARDS)}, "bank")
        ground = Ground({name: cluster[name].dsn_for("bank") for name in ("cat", *SHARDS)}, directory)
        started = [routers.start(ground.config_file, **settings) for _ in range(asked.routers)]
        played = play(
            ground,
            started,
            directory / "ledger",
            seed=seed,
            seconds=asked.minutes * 60,
            clients=asked.clients,
            rate=asked.rate,
            strike_every_s=asked.strike_every,
        )
        print(played, flush=True)
    if played.ok:
        shutil.rmtree(directory)
    else:
        print(f"configuration, ledgers and what the routers said: {directory}", flush=True)
    return 0 if played.ok else 1


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="of each router")
    parser.add_argument("--pooling", choices=("session", "transaction"), default="session")
    parser.add_argument("--rate", type=float, default=25.0, help="operations a second of each client, at most")
    parser.add_argument("--strike-every", type=float, default=6.0, metavar="SECONDS")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
