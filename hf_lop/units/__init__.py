"""What can go from a model: units, found, measured and cut."""
