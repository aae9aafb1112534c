"""The version of the distribution `plume-embed`."""

__version__ = "0.1.0"
