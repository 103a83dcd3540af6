"""Runs the guests of one host: journal, overlays, qemu, network, console, and the report about all of it."""
