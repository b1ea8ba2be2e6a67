"""The seeds' name of `optimal_sampling`."""
