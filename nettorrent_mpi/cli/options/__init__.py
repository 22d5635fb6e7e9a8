"""The options of the commands, each with its `--help`."""
