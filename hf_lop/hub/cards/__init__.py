"""Cards of all repositories."""
