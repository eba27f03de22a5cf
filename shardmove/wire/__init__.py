"""The protocol of PostgreSQL's clients and servers: bytes in, bytes out. Nothing here waits, sends or receives."""
