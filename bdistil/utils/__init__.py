"""General helpers: seeds, processes, threads, memory, signals, eval mode."""
