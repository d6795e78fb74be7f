"""Searching the layer ratios of one target: the candidates, two engines behind one ask and tell, and the loop that runs them."""
