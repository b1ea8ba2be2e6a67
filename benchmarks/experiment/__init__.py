"""Which text makes the best student: arms, seeds, pairs, and the comparison of what they made."""
