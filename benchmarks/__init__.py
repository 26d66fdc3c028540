"""Measurements that anyone can repeat: each command appends rows to ``benchmarks/results``; see docs/benchmarks.md."""
