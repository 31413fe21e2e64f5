"""Training: guidance loss, trainer on TRL, freezing, and the four stages of Table 1."""
