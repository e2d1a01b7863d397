"""Stubs of protos/double11/v1/*.proto (package double11.v1). Regenerate with `make protos`."""
