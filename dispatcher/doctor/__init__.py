"""`flexlb doctor`: facts gathered from the servers, and pure findings about them."""
