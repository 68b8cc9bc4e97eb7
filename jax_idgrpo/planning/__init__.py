"""Estimate memory, FLOPs and step time of every program with the compiler."""
