"""The token proxy: checks who may open a console, and carries its bytes to the host that runs the desktop."""
