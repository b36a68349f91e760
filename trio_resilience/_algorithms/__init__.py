"""Pure rules: no clock, no I/O, no trio; time and randomness are arguments."""
