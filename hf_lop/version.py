"""The version, for all rooms: it imports nothing."""

__version__ = "0.2.0"
