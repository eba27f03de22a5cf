"""shardmove moves key ranges between plain PostgreSQL servers: online, verified row for row, reversible."""

__version__ = "0.2.0"
