"""Trace replay: read a recorded workload, send it open loop through the real path, report."""
