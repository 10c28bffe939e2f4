"""Pure models: an inference engine and a fleet of them. No clock, no I/O; live and offline use share them."""
