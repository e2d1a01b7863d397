"""Events: the durable log, the codec, and the job that folds them into features exactly once."""
