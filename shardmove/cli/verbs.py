"""The application with all of its verbs: each module adds its own, in the order of the help page."""

from __future__ import annotations

# isort: off
from shardmove.cli.root import app
from shardmove.cli import cluster, planning, moving, watching, service, router
# isort: on

__all__ = ["app", "cluster", "moving", "planning", "router", "service", "watching"]
