"""The contract that the four services share: session life, hosts, machines, messages, topology, tickets.

Imports no sibling package and does no I/O, so that every other part may depend on it.
"""
