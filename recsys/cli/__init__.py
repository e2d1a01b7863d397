"""The `double11` command: one file per command group, heavy rooms imported inside the command."""
