"""Decides which host runs which desktop, and keeps the ledger true to what the hosts report."""
