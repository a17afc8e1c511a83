"""Measurements of speed and memory: declared workloads, honest timing, and what it is measured against."""
