"""Methods side by side: rows, tables and plots."""
