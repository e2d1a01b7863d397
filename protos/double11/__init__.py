"""Generated protobuf and gRPC stubs; import `double11.v1`. Regenerate with `make protos`."""
