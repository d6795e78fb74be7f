"""What is known from data: statistics, importance, probes, rewards, and predictors learned from plans."""
