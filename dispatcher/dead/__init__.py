"""`flexlb dead`: what an operator does with dead letters."""
