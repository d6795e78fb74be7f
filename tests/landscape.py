"""A cheap reward for tests of searches."""

import numpy as np


def toy_reward(ratios):
    """0 is best; early layers suffer most, and neighbours share their damage."""
    weights = np.linspace(2, 0.5, len(ratios))
    return -float(np.mean(weights * ratios**3) + 0.1 * np.mean(ratios[1:] * ratios[:-1])) if len(ratios) > 1 else 0.0
