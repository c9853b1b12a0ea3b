"""Where the W hidden states of a token come from: one module for each kind of slot."""
