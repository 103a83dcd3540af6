"""Builds the images of the machine catalogue from Debian packages, with the standard library only."""
