"""Non-uniform compression: levels, their costs, and the best level for every layer under a budget."""
