"""Running a text decoder alone, and in parts."""
