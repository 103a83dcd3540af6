"""The durable record of hosts and sessions. Only the scheduler writes it; portal and CLI read it."""
