"""Helpers that know nothing of distillation: seeds, processes, threads, memory, signals."""
