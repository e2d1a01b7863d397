"""Online stores: where the streaming job writes feature state and serving reads it."""
