"""The subcommands of `mesh`, a file each: `add_parser(subparsers)` and the command, a function of the parsed arguments that
returns the exit code. mesh/cli.py puts them together."""
