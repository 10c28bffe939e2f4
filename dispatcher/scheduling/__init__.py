"""What is decided: synchronous, given `now` and `rng`, returning values. No I/O, no clock."""
