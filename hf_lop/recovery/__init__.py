"""Making up for the cut: output projections take over what removed neurons did."""
