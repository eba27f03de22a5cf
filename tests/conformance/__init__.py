"""The test suites of PostgreSQL drivers, run twice: directly against a server, and through a router in front of it.

python -m tests.conformance --psycopg DIRECTORY --asyncpg DIRECTORY        (`docs/conformance.md`)

The directories are source trees of the drivers' releases, wherever the user has them; nothing of them is kept here.

    suites      what each driver's suite needs, and how it is told where the server is
    recorder    a pytest plugin in the suite's own process: what became of each test, one line each
    runs        one run of a suite, whatever happens in it
    differences what passes directly and not through the router, and the reasons that `reasons.toml` gives
    ground      the server, the router, the database of a run
"""
