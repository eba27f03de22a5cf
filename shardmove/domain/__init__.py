"""Pure values and rules: keys, ranges, routes, moves, digests, errors. No I/O."""
