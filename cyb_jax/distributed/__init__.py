"""Several hosts that train one model: what they must agree on, and how one that dies is noticed."""
