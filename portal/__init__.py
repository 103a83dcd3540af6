"""The web portal, its HTTP API and the operator's command."""
