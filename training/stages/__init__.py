"""One script per training stage (paper Table 1), and what runs them."""
