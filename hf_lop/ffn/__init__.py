"""What is cut: finding FFNs, their statistics, the importance of their neurons, and cutting."""
