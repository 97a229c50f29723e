"""Benchmarks of gpu-poor. Each module answers one question and writes one JSON file."""
