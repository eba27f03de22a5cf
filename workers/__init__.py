"""The data plane: copy, erase and digest tasks, the cuts that make them, and the executors that run them."""
