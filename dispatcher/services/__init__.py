"""When: one loop per module, wait -> decide (a pure call) -> act."""
