"""A whole Deskfleet on one machine, in one folder: for trying it out, for the system tests and for the benchmarks."""
