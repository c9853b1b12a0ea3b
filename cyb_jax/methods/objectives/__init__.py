"""How the states of a token's slots become a stopping-time distribution and a loss: one module for each way."""
