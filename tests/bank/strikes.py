"""Routers killed and started again, in turn: at any time at least one of two runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from itertools import cycle
from typing import Final

from tests.support.router import Router

DOWN_S: Final = (0.1, 1.5)


class Strikes(threading.Thread):
    """Every so often the next router is killed, is down for a moment, and starts. `failed`: why it ended early."""

    def __init__(self, routers: Sequence[Router], seed: int, every_s: float) -> None:
        super().__init__(name="strikes", daemon=True)
        self._routers = routers
        self._random = random.Random(f"{seed} strikes")
        self._every_s = every_s
        self._enough = threading.Event()
        self.count = 0
        self.failed: BaseException | None = None

    def stop(self) -> None:
        """When the thread has ended, all routers run."""
        self._enough.set()

    def run(self) -> None:
        try:
            for router in cycle(self._routers):
                if self._enough.wait(self._every_s * self._random.uniform(0.5, 1.5)):
                    return
                router.kill()
                self.count += 1
                self._enough.wait(self._random.uniform(*DOWN_S))
                router.start()
        except BaseException as error:
            self.failed = error
            raise
