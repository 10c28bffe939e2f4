"""Where things are said: one external system per module, one round trip or one script per method."""
